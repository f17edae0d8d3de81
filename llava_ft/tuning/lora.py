"""LoRA on the language model: which modules get an adapter, and how that is written down.

Source: LoRA (arXiv:2106.09685), through PEFT. Differs from LLaVA: targets are matched by their full names inside the
language model. A list of leaf names such as `q_proj` also matches CLIP's attention, and then an adapter appears in the
vision tower when the list is applied to a model whose tower is already loaded.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llava_ft.errors import UserError
from llava_ft.models.parts import DECODER_LAYER, language_model_linears, module_part
from llava_ft.tuning.kernels import why_not_fast
from llava_ft.tuning.kernels.lora_layer import use_fast_layers


def target_pattern(
    model: nn.Module, leaf_names: Sequence[str] | None = None, layers: Sequence[int] | None = None
) -> str:
    """Write the LoRA targets as one regular expression over full module names.

    PEFT, in every version, compares such an expression with the whole name, so nothing outside the decoder's layers
    can match: it is the exclusion of the vision tower, and it is short enough to read in `adapter_config.json`.

    Args:
        model: The model before adapters are added.
        leaf_names: Last parts of the names wanted, such as `q_proj`; all linear layers when absent.
        layers: Numbers of the decoder's layers that get adapters; all when absent.

    Raises:
        UserError: A name is no linear layer of the decoder.
    """
    known = {re.sub(DECODER_LAYER, "", name, count=1) for name in language_model_linears(model)}
    leaves = {name.rpartition(".")[2]: name for name in sorted(known)}
    unknown = sorted(set(leaf_names or ()) - set(leaves))
    if unknown:
        raise UserError(
            f"lora_target_modules names {', '.join(unknown)}, which the language model does not have. "
            f"Its linear layers are {', '.join(leaves)}."
        )
    wanted = sorted(leaves[leaf] for leaf in (leaf_names or leaves))
    layer = DECODER_LAYER
    if layers is not None:
        layer = layer.replace(r"\d+", "(?:" + "|".join(map(str, layers)) + ")")
    return layer + "(?:" + "|".join(re.escape(name) for name in wanted) + ")"


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    bias: Literal["none", "all", "lora_only"] = "none",
    leaf_names: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    base_model_name: str | None = None,
    fast: bool = True,
) -> PeftModel:
    """Wrap a model with LoRA adapters on its language model. LoRA weights are float32.

    Args:
        model: The model.
        r: Rank.
        alpha: Scale times rank.
        dropout: Probability with which an adapter's input is dropped.
        bias: Which biases of the language model are trained: `none`, `all` or `lora_only`.
        leaf_names: Which linear layers are adapted; see `target_pattern`.
        layers: In which layers of the decoder.
        base_model_name: Written into `adapter_config.json`.
        fast: Whether the adapted layers compute as `kernels/lora_layer.py` says, and not as PEFT does, where
            they are of its form.

    Raises:
        UserError: A layer name is unknown.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,
        target_modules=target_pattern(model, leaf_names, layers),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_name,
    )
    model.name_or_path = base_model_name  # PEFT writes this over what its config says
    peft_model = wrap_with_peft(model, config)
    for name, parameter in peft_model.named_parameters():
        if name.endswith("bias") and module_part(name) == "vision tower":
            parameter.requires_grad_(False)
    if fast and why_not_fast(model.config) is None:
        use_fast_layers(peft_model)
    return peft_model


def wrap_with_peft(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wrap a model as the adapter's configuration says; LoRA weights are float32."""
    with warnings.catch_warnings():
        # PEFT asks for an attribute that transformers renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped
