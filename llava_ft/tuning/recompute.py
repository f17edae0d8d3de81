"""Recomputation: what of a layer is kept for the backward pass, and what is computed again there.

| gradient_checkpointing | kept of a layer | computed again |
| --- | --- | --- |
| none | all that autograd keeps | nothing |
| selective | results of matrix products and of attention | norms, activations, casts, low-rank products |
| full | its input, which may wait in the host's memory | everything |

Source: Chen et al. (arXiv:1604.06174) for `full`, Korthikanti et al. (arXiv:2205.05198) for `selective`, both through
torch's non-reentrant checkpointing. Differs from transformers' switch: a part of the model that is not trained is left
alone, no input is made to need a gradient, random numbers are only kept where something is drawn, and decoder layers
that keep little themselves (`kernels/lora_layer.py`) are not wrapped for `selective`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_ft.models.parts import part_of
from llava_ft.tuning.kernels.lora_layer import LoraDecoderLayer

Mode = Literal["none", "full", "selective"]

_aten: Final = torch.ops.aten
_PRODUCTS: Final = frozenset({_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm})
_ATTENTION: Final = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
        "flex_attention",
        "inductor_compiled_code",
    }
)
"""Attention kernels by the names of their operations; flex_attention's is compiled code."""

_QUANTIZED_PRODUCTS: Final = frozenset(
    {
        "bitsandbytes::gemm_4bit",
        "bitsandbytes::gemv_4bit",
        "bitsandbytes::int8_linear_matmul",
        "bitsandbytes::int8_mixed_scaled_mm",
        "bitsandbytes::int8_scaled_mm",
    }
)
_CHEAP: Final = 4


@dataclass(frozen=True)
class Recomputation:
    """What a run computes again in the backward pass."""

    mode: Mode = "none"  # what of a layer
    every: int = 1  # of which layers: the first of each so many
    offload: bool = False  # whether the inputs of these layers wait in the host's memory; with `full` alone

    @classmethod
    def of_run(cls, mode: Mode, every: int, *, offload: bool, is_compiled: bool) -> "Recomputation":
        """What a run's flags come to. The compiler decides itself what it keeps, so `selective` is left to it."""
        return cls() if is_compiled and mode == "selective" else cls(mode, every, offload)

    def includes(self, index: int) -> bool:
        """Whether something of the layer with this index is computed again."""
        return self.mode != "none" and index % self.every == 0

    @property
    def flags(self) -> str:
        """The flags that ask for it."""
        words = [f"--gradient_checkpointing {self.mode}"]
        if self.every != 1:
            words.append(f"--gradient_checkpointing_every {self.every}")
        if self.offload:
            words.append("--activation_offload True")
        return " ".join(words)

    def __str__(self) -> str:
        """Return it in words: `full gradient checkpointing of every 2nd layer, inputs in host memory`."""
        if self.mode == "none":
            return "no gradient checkpointing"
        which = f" of every {_ordinal(self.every)} layer" if self.every != 1 else ""
        return f"{self.mode} gradient checkpointing{which}{', inputs in host memory' if self.offload else ''}"


def recompute_activations(
    model: nn.Module,
    recomputation: Recomputation,
    *,
    options: Mapping[str, Any] | None = None,
    offloading: Callable[[], AbstractContextManager[Any]] | None = None,
) -> int:
    """Let the trained parts of a model recompute their layers while training.

    Args:
        model: The model, with what is trained marked by `requires_grad`.
        recomputation: What is computed again.
        options: For `torch.utils.checkpoint`, such as `determinism_check`. `use_reentrant` is always false.
        offloading: Makes the context in which the inputs of layers are saved if they are to wait elsewhere; torch's
            `save_on_cpu` when absent.

    Returns:
        The number of layers.
    """
    if recomputation.mode == "none":
        return 0
    settings: dict[str, Any] = {"preserve_rng_state": _draws_numbers(model), **(options or {}), "use_reentrant": False}
    waiting: Callable[[], AbstractContextManager[Any]] = nullcontext
    if recomputation.offload:
        waiting = offloading or partial(save_on_cpu, pin_memory=torch.cuda.is_available())
    count = 0
    for layers in _trained_stacks(model):
        for layer in layers[:: recomputation.every]:
            run = partial(_run_selective, layer) if recomputation.mode == "selective" else partial(_run_full, waiting)
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(run, settings)  # pyright: ignore[reportArgumentType]
            count += 1
    return count


def _run_full(
    waiting: Callable[[], AbstractContextManager[Any]], settings: Mapping[str, Any], function: Any, *args: Any
) -> Any:
    with waiting():
        return checkpoint(function, *args, **settings)


def _run_selective(layer: nn.Module, settings: Mapping[str, Any], function: Any, *args: Any) -> Any:
    if isinstance(layer, LoraDecoderLayer) and layer.keeps_little(args[0]):
        return function(*args)
    contexts = partial(create_selective_checkpoint_contexts, _choose)
    return checkpoint(function, *args, context_fn=contexts, **settings)


def _choose(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decide whether the result of an operation is kept."""
    name = operation.name()
    if isinstance(operation, torch._ops.OpOverload):
        name = name.partition(".")[0]
        if operation.overloadpacket in _PRODUCTS:
            first, second = args[-2:]
            again = is_cheap(first.shape[-1], second.shape[-1])
            return CheckpointPolicy.PREFER_RECOMPUTE if again else CheckpointPolicy.MUST_SAVE
    if name in _ATTENTION or name in _QUANTIZED_PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def is_cheap(width_in: int, width_out: int) -> bool:
    """Whether `selective` computes a product again: LoRA's B and eager attention's scores.

    These sum over few values for each value of their result, so keeping it would save little time.

    Args:
        width_in: Values that are summed over.
        width_out: Values of a row of the result.
    """
    return width_out > _CHEAP * width_in


def _trained_stacks(model: nn.Module) -> Iterator[list[GradientCheckpointingLayer]]:
    """Lists of layers that the backward pass goes through: the decoder's, and the tower's if it is trained."""
    trains_tower = any(p.requires_grad for name, p in model.named_parameters() if part_of(name) == "vision tower")
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or (part_of(name) == "vision tower" and not trains_tower):
            continue
        layers = [layer for layer in module if isinstance(layer, GradientCheckpointingLayer)]
        if len(layers) == len(module):
            yield layers


def _draws_numbers(model: nn.Module) -> bool:
    """Whether something drops values at random, which has to drop the same ones when it is computed again."""

    def probabilities(module: nn.Module) -> Iterator[Any]:
        yield module.p if isinstance(module, nn.Dropout) else 0.0
        yield from (getattr(module, name, 0.0) for name in ("attention_dropout", "dropout"))  # transformers' attention

    return any(isinstance(p, float) and p > 0.0 for module in model.modules() for p in probabilities(module))


def _ordinal(number: int) -> str:
    return f"{number}{'th' if number % 100 in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
