"""What a run trains, part by part of the model: the table that fills in from the flags and that everything else asks.

| flags | full | LoRA | rows of added tokens |
| --- | --- | --- | --- |
| `tune_mm_mlp_adapter` | projector | | of the input |
| `lora_enable` | projector | language model | of input and output |
| neither | embeddings, language model, head, projector | | with their matrices |

`image_newline`, where there is one, goes with the projector. `freeze_mm_mlp_adapter` takes both out, `freeze_backbone`
the language model with its head. The vision tower is frozen. Trained parameters are float32, the master weights of a
mixed-precision run; frozen ones are in the compute dtype.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from llava_ft.errors import UserError
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.models.parts import LANGUAGE_MODEL, PARTS, PROJECTOR, Part, module_part, part_of
from llava_ft.models.token_rows import EmbeddingWithNewRows, HeadWithNewRows, last_rows

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class PartPlan:
    """How one part of the model is trained."""

    how: Literal["frozen", "lora", "full"] = "frozen"
    layers: range | None = None  # which of the part's layers, and nothing outside them; None for the whole part
    learning_rate: float | None = None  # None for the run's own
    weight_decay: float | None = None  # of matrices; None for the run's own
    from_step: int = 0  # the optimizer step from which it is trained; carried here, no run reads it yet

    def includes(self, name: str) -> bool:
        """Whether a parameter or module of the part lies in the layers."""
        if self.layers is None:
            return True
        layer = _LAYER.search(name)
        return layer is not None and int(layer.group(1)) in self.layers


@dataclass(frozen=True)
class TuningPlan:
    """What a run trains."""

    parts: Mapping[Part, PartPlan]  # a part that is absent is frozen; LoRA and token rows go by the part they are in
    new_rows: frozenset[Part] = frozenset()  # frozen matrices whose rows of added tokens are trained on their own

    def __post_init__(self) -> None:
        adapted = [part for part, plan in self.parts.items() if plan.how == "lora"]
        if adapted not in ([], ["language model"]):
            raise UserError(f"LoRA is for the language model; {', '.join(adapted)} can be frozen or trained in full.")
        if self.new_rows and not adapted and self.trains_any(set(PARTS) - PROJECTOR):
            raise UserError(
                "Rows of added tokens are trained on their own beside LoRA or with a projector alone: the whole model, "
                "which has to be written here, has no place for them."
            )

    @classmethod
    def from_flags(
        cls,
        *,
        lora_enable: bool,
        tune_mm_mlp_adapter: bool,
        freeze_mm_mlp_adapter: bool,
        freeze_backbone: bool,
        has_vision: bool,
        mm_projector_lr: float | None = None,
    ) -> "TuningPlan":
        """Fill in the table from the original's flags.

        Raises:
            UserError: Nothing would be trained.
        """
        parts: dict[Part, PartPlan] = {}
        if has_vision and not freeze_mm_mlp_adapter:
            parts = {"projector": PartPlan("full", learning_rate=mm_projector_lr), "image newline": PartPlan("full")}
        if lora_enable:
            return cls(parts).with_lora()
        if tune_mm_mlp_adapter:
            if not has_vision:
                raise UserError(
                    "tune_mm_mlp_adapter trains the projector, but the model is text-only. Add --vision_tower."
                )
            return cls(parts, new_rows=frozenset({"embeddings"}))
        if not freeze_backbone:
            parts |= dict.fromkeys(LANGUAGE_MODEL, PartPlan("full"))
        if not parts:
            raise UserError("freeze_backbone leaves nothing to train in this run. Leave the flag out.")
        return cls(parts)

    def __hash__(self) -> int:
        return hash((frozenset(self.parts.items()), self.new_rows))

    def with_lora(self) -> "TuningPlan":
        """Return the plan with adapters on the language model in place of its own weights."""
        parts: dict[Part, PartPlan] = {"language model": PartPlan("lora")}
        parts |= {part: plan for part, plan in self.parts.items() if part not in LANGUAGE_MODEL}
        return TuningPlan(parts, new_rows=frozenset({"embeddings", "head"}))

    @property
    def has_lora(self) -> bool:
        """Whether some part gets adapters."""
        return any(plan.how == "lora" for plan in self.parts.values())

    def of(self, name: str) -> PartPlan:
        """Return how the part is trained that a parameter or module lies in."""
        return self.parts.get(module_part(name), PartPlan())

    def trains_any(self, parts: Collection[Part]) -> bool:
        """Whether own weights of one of the parts are trained, apart from adapters and rows of added tokens."""
        return any(plan.how == "full" for part, plan in self.parts.items() if part in parts)

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained, by its name; LoRA weights and separate rows of added tokens always are."""
        plan = self.of(name)
        return part_of(name) in ("LoRA", "new token rows") or (plan.how == "full" and plan.includes(name))

    def rate_and_decay(self, name: str, num_dimensions: int) -> tuple[float | None, float | None]:
        """Learning rate and weight decay of a parameter; None for the run's own. As in LLaVA, only matrices decay."""
        plan = self.of(name)
        return plan.learning_rate, plan.weight_decay if num_dimensions >= 2 else 0.0

    def dtype_of(self, name: str, compute_dtype: torch.dtype, master_dtype: torch.dtype = torch.float32) -> torch.dtype:
        """The dtype in memory of the parameter with this name; `master_dtype` if it is trained."""
        return master_dtype if self.trains(name) else compute_dtype

    def apply(self, model: nn.Module) -> None:
        """Set `requires_grad` of every parameter; with adapters after these have been added."""
        for name, parameter in model.named_parameters():
            # PEFT has marked the adapters and, with `lora_bias`, biases of the layers around them.
            if self.of(name).how != "lora":
                parameter.requires_grad_(self.trains(name))

    def separate_new_rows(self, model: LlavaForCausalLM, num_new: int) -> None:
        """Make the rows of added tokens trainable on their own where the plan has them in a frozen matrix."""
        if num_new == 0 or not self.new_rows:
            return
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        with_rows = EmbeddingWithNewRows(embeddings, num_new)
        model.set_input_embeddings(with_rows)
        if "head" in self.new_rows:
            is_tied = model.config.tie_word_embeddings
            rows = with_rows.new_rows if is_tied else last_rows(model.lm_head.weight, num_new)
            model.lm_head = HeadWithNewRows(model.lm_head, rows)
