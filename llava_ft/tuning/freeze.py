"""Which parts of the model a run trains, and in which dtype each parameter is held.

| run | trained |
| --- | --- |
| projector pretraining (`tune_mm_mlp_adapter`) | projector, input rows of added tokens |
| LoRA (`lora_enable`) | LoRA weights, projector, input and output rows of added tokens |
| full | language model, projector |

`image_newline`, where there is one, goes with the projector. `freeze_mm_mlp_adapter` takes both out, `freeze_backbone`
the language model with its head. The vision tower is frozen. Trained parameters are float32, the master weights of a
mixed-precision run; frozen ones are in the compute dtype.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import nn

from llava_ft.errors import UserError
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.models.parts import part_of
from llava_ft.models.token_rows import add_new_rows

Method = Literal["full", "lora", "projector"]

DECODER_LAYER: Final = r"model\.layers\.\d+\."
"""What the names of everything in the decoder's layers start with."""


@dataclass(frozen=True)
class TuningPlan:
    """What a run trains."""

    method: Method
    train_projector: bool  # and `image_newline` with it
    train_language_model: bool  # its own weights, apart from adapters

    @classmethod
    def from_flags(
        cls,
        *,
        lora_enable: bool,
        tune_mm_mlp_adapter: bool,
        freeze_mm_mlp_adapter: bool,
        freeze_backbone: bool,
        has_vision: bool,
    ) -> "TuningPlan":
        """Settle the plan from the original's flags.

        Raises:
            UserError: Nothing would be trained.
        """
        method: Method = "lora" if lora_enable else "projector" if tune_mm_mlp_adapter else "full"
        plan = cls(
            method=method,
            train_projector=has_vision and not freeze_mm_mlp_adapter,
            train_language_model=method == "full" and not freeze_backbone,
        )
        if method == "projector" and not has_vision:
            raise UserError("tune_mm_mlp_adapter trains the projector, but the model is text-only. Add --vision_tower.")
        if method == "full" and not (plan.train_projector or plan.train_language_model):
            raise UserError("freeze_backbone leaves nothing to train in this run. Leave the flag out.")
        return plan

    def trains(self, name: str) -> bool:
        """Whether the parameter with this name is trained. LoRA parameters always are."""
        part = part_of(name)
        if part in ("LoRA", "new token rows"):
            return True
        if part in ("projector", "image newline"):
            return self.train_projector
        return part != "vision tower" and self.train_language_model

    def dtype_of(self, name: str, compute_dtype: torch.dtype, master_dtype: torch.dtype = torch.float32) -> torch.dtype:
        """The dtype in memory of the parameter with this name; `master_dtype` if it is trained."""
        return master_dtype if self.trains(name) else compute_dtype

    def apply(self, model: nn.Module) -> None:
        """Set `requires_grad` of every parameter."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name))

    def separate_new_rows(self, model: LlavaForCausalLM, num_new: int) -> None:
        """Make the rows of added tokens trainable on their own where the matrices around them are frozen.

        Pretraining trains the input rows alone, as the original does; LoRA runs train input and output rows.
        """
        if num_new == 0 or self.train_language_model or self.method == "full":
            return
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        rows = add_new_rows(embeddings, num_new)
        if self.method != "lora":
            return
        add_new_rows(model.lm_head, num_new)
        if model.config.tie_word_embeddings:
            model.lm_head.new_rows = rows


def language_model_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers of the decoder, without the head, in model order: what is adapted and quantised."""
    pattern = re.compile(DECODER_LAYER)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern.match(name)]
