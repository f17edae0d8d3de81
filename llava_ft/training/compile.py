"""`--torch_compile`: each layer compiled on its own, with one graph for all layers of a kind.

Compiling layer by layer (regional compilation) takes as long as compiling one layer, whatever the depth of the model,
and leaves alone what differs from batch to batch: where images stand, which positions are supervised, where joined
samples begin. Differs from transformers' switch, which hands over the whole model and compiles it anew whenever one of
these changes.

What is compiled is the layer's forward alone. Hooks (those by which ZeRO-3 gathers weights) and gradient checkpointing
stay around it, modules and names of parameters stay what they were, and the attention kernel is called between graphs.

A graph is made for the first length that is seen, and another for any length when a second one comes. Lengths that
are multiples of one number keep it at that (`--length_multiple`).
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.models.towers import VisionTower

logger = logging.getLogger(__name__)

_GRAPHS_OF_A_LAYER: Final = 64
"""So many graphs may be made for one kind of layer: for training and evaluation, with a mask and without. torch's own
limit of 8 would leave layers uncompiled without an error."""


def compile_layers(model: nn.Module, *, backend: str = "inductor", mode: str | None = None) -> int:
    """Compile the decoder's layers, and those of the vision tower if it runs; compilation happens when they first do.

    Args:
        model: The model, with or without adapters, before anything distributed is wrapped around it.
        backend: Of `torch.compile`.
        mode: Of `torch.compile`, such as `max-autotune`; None is its default.

    Returns:
        Number of layers.
    """
    torch._dynamo.config.recompile_limit = max(_GRAPHS_OF_A_LAYER, torch._dynamo.config.recompile_limit)
    native: Any = next(module for module in model.modules() if isinstance(module, LlavaForCausalLM))
    _keep_attention_outside(native.config._attn_implementation)
    stacks: list[list[Any]] = [list(native.model.layers)]
    tower = getattr(native.model, "vision_tower", None)
    if native.runs_tower and isinstance(tower, VisionTower):
        encoder: Any = tower.vision_tower["vision_model"]
        if isinstance(encoder, PreTrainedModel):
            _keep_attention_outside(encoder.config._attn_implementation)
        stacks.append(list(tower.layers)[: tower.num_layers_run])
    compiled: dict[type, Callable[..., Any]] = {}
    for layers in stacks:
        for number, layer in enumerate(layers):
            kind = type(layer)
            if kind not in compiled:
                forward = getattr(kind.forward, "__wrapped__", kind.forward)  # without transformers' checkpointing
                compiled[kind] = torch.compile(forward, backend=backend, mode=mode)
            is_last = number == len(layers) - 1
            layer.forward = partial(_run_compiled, layer, compiled[kind], is_last)
            layer._z3_leaf = True  # ZeRO-3 then gathers a layer's weights around it, and not within the graph
    return sum(map(len, stacks))


def _run_compiled(layer: Any, compiled: Callable[..., Any], is_last: bool, *args: Any, **kwargs: Any) -> Any:
    """Run a layer's compiled forward, within gradient checkpointing where that is on, as transformers does."""
    if not is_last:
        kwargs.pop("read_positions", None)  # for the last layer alone: the others then share their graph
    if getattr(layer, "gradient_checkpointing", False) and layer.training:  # a tower's own layers may have none
        return layer._gradient_checkpointing_func(partial(compiled, layer, **kwargs), *args)
    return compiled(layer, *args, **kwargs)


def _keep_attention_outside(name: str | None) -> None:
    """Let dynamo call a kernel instead of looking into it; eager attention, which has no name here, is compiled."""
    if name not in ALL_ATTENTION_FUNCTIONS:
        return
    kernel = ALL_ATTENTION_FUNCTIONS[name]
    if not getattr(kernel, "_torchdynamo_disable", False):
        ALL_ATTENTION_FUNCTIONS[name] = torch.compiler.disable(kernel)
