"""A decoder layer of LLaMA with adapters in three steps that each keep little: attention's inputs, its output, the MLP.

What autograd keeps of such a layer when it sees single operations is several times what the gradients need. Here each
step is one function with its backward pass written out:

| step | keeps, beside low-rank values | computes again in the backward pass |
| --- | --- | --- |
| norm, q, k, v, rotation | its input | the norm |
| o, residual | its input, which attention keeps too | |
| norm, gate, up, SwiGLU, down, residual | its input, gate, up | the norm, SwiGLU |

Frozen weights may be packed in 4 bits. Modules and parameters are those of transformers and PEFT. Where a layer is not
what these functions compute - weights in 8 bits, biases, DoRA, several adapters, trained norms - its own modules run as
before, and the log says so once.

Shapes: B samples, T positions (B T of them in flat tensors), D width, I width inside the MLP.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, LlamaRMSNorm

from llava_ft.models.kernels.last_layer import (
    LastDecoderLayer,
    SelectiveAttention,
    attend,
    rows_of,
    takes_chosen_queries,
)
from llava_ft.models.precision import compute_dtype
from llava_ft.tuning.kernels.lora_linear import (
    Gradients,
    Kept,
    LoraProduct,
    adapted_gradients,
    adapted_products,
    flat_gradients,
)
from llava_ft.tuning.kernels.lora_weights import Flat, LoraWeights, weights_of

_LOGGER = logging.getLogger(__name__)

_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")

_FUSED_NORM = ("aten::_fused_rms_norm", "aten::_fused_rms_norm_backward")
_HAS_FUSED_NORM: bool = all(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in _FUSED_NORM)


class LoraDecoderLayer(LastDecoderLayer):
    """A decoder layer that computes as this module's text says where it can.

    It reads its linear layers' weights without calling them, so ZeRO-3 has to gather those of the layer together.
    """

    _z3_leaf = True

    def forward(
        self, hidden_states: torch.Tensor, *, read_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Run the layer; see `LastDecoderLayer.forward`. `read_positions` are the last layer's alone."""
        if read_positions is not None and self.self_attn.layer_idx != self.self_attn.config.num_hidden_layers - 1:
            read_positions = None
        is_plain = kwargs.get("past_key_values") is None and not kwargs.get("output_attentions")
        weights = _weights_of(self, hidden_states) if is_plain else "a cache"
        if isinstance(weights, str):
            return super().forward(hidden_states, read_positions=read_positions, **kwargs)
        dropout, layers = weights
        attention = self.self_attn
        cos, sin = kwargs.pop("position_embeddings")
        flat, norm, query_rows = Flat.of(layers[:3]), self.input_layernorm, None
        if read_positions is not None and takes_chosen_queries(attention, hidden_states, kwargs.get("attention_mask")):
            query_rows = kwargs["query_positions"] = read_positions
        query, key, value = NormProject.apply(
            hidden_states,
            norm.weight,
            norm.variance_epsilon,
            cos,
            sin,
            query_rows,
            attention.head_dim,
            dropout,
            flat.layout,
            *flat.tensors,
        )
        attended, _ = attend(attention, query, key, value, **kwargs)
        attended = attended.flatten(2)
        if read_positions is not None:
            hidden_states = rows_of(hidden_states, read_positions)
            if query_rows is None:
                attended = rows_of(attended, read_positions)
        flat = Flat.of(layers[3:4])
        hidden_states = LoraProduct.apply(attended, hidden_states, dropout, flat.layout, *flat.tensors)
        flat, norm = Flat.of(layers[4:]), self.post_attention_layernorm
        return LoraMLP.apply(hidden_states, norm.weight, norm.variance_epsilon, dropout, flat.layout, *flat.tensors)

    def keeps_little(self, hidden_states: torch.Tensor) -> bool:
        """Whether the layer computes such an input by this module's functions, which recompute what is cheap."""
        return not isinstance(_weights_of(self, hidden_states), str)


def use_fast_layers(model: nn.Module) -> int:
    """Let the decoder layers of a model with adapters compute as `LoraDecoderLayer`; returns how many.

    Layers that are left to PEFT's modules are named in the log, with the reason, at the first forward pass in training.
    """
    layers = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    for layer in layers:
        layer.__class__ = LoraDecoderLayer
        layer.self_attn.__class__ = SelectiveAttention
    for decoder in [module for module in model.modules() if isinstance(module, LlamaModel)]:
        report = _ReportOnce()
        report.handle = decoder.register_forward_pre_hook(report, with_kwargs=True)
    return len(layers)


class _ReportOnce:
    """Says, at the first forward pass in training, which layers are left to PEFT's modules, and why."""

    handle: torch.utils.hooks.RemovableHandle

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not decoder.training or torch.compiler.is_compiling():
            return
        self.handle.remove()
        hidden = kwargs.get("inputs_embeds")
        left: dict[str, list[int]] = {}
        for number, layer in enumerate(decoder.layers):
            reason = _weights_of(layer, decoder.norm.weight if hidden is None else hidden)
            if isinstance(reason, str):
                left.setdefault(reason, []).append(number)
        for reason, numbers in left.items():
            _LOGGER.warning(
                "fast_lora: %d of %d decoder layers (%s) are computed by PEFT's modules, with the same result, more "
                "slowly and with more memory: %s.",
                len(numbers),
                len(decoder.layers),
                _ranges(numbers),
                reason,
            )


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers as ranges: `0-3, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


@torch.compiler.disable()
def _weights_of(layer: LlamaDecoderLayer, hidden: torch.Tensor) -> tuple[float, list[LoraWeights]] | str:
    """The dropout and the weights of the seven linear layers; or why they are not plain frozen layers with LoRA.

    It stays out of compiled graphs, which then depend on no layer's modules, so that all layers share one. The
    compiler could not read weights in 4 bits either: they are of a type of their own.
    """
    norms: tuple[Any, ...] = (layer.input_layernorm, layer.post_attention_layernorm)
    if any(type(norm) is not LlamaRMSNorm or norm.weight.requires_grad for norm in norms):
        return "its norms are trained, or are not LLaMA's"
    if layer.mlp.config.hidden_act != "silu":
        return f"its activation is {layer.mlp.config.hidden_act} and not silu"
    found: list[LoraWeights] = []
    dropouts: set[float] = set()
    for parent, names in ((layer.self_attn, _ATTENTION_LINEARS), (layer.mlp, _MLP_LINEARS)):
        for name in names:
            weights = weights_of(getattr(parent, name))
            if isinstance(weights, str):
                return f"{name} has {weights}"
            found.append(weights[0])
            if weights[0].rank:
                dropouts.add(weights[1])
    if len(dropouts) > 1:
        return "its adapters differ in dropout"
    wanted = {layer.dtype for layer in found}
    if torch.is_autocast_enabled(hidden.device.type):
        wanted = {layer.packing.dtype for layer in found if layer.packing is not None} | {compute_dtype(hidden)}
    if wanted != {hidden.dtype}:
        return f"hidden states are {hidden.dtype}, products are in {' and '.join(sorted(map(str, wanted)))}"
    return max(dropouts, default=0.0), found


def _has_fused_norm(device: str) -> bool:
    """Whether torch has kernels that compute RMSNorm and its gradient in one pass: on a GPU, not on a CPU."""
    return device == "cuda" and _HAS_FUSED_NORM


def _normalize(x_TD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm: the result in the dtype of `x`, and the inverse root of the mean square, `(T, 1)` float32."""
    if _has_fused_norm(x_TD.device.type) and x_TD.dtype == weight_D.dtype:
        return torch.ops.aten._fused_rms_norm(x_TD, [x_TD.shape[-1]], weight_D, epsilon)
    x32_TD = x_TD.float()
    mean_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True).square_().div_(x_TD.shape[-1])
    inverse_T1 = mean_T1.add_(epsilon).rsqrt_()
    return (x32_TD * inverse_T1).to(x_TD.dtype).mul_(weight_D), inverse_T1


def _norm_gradient(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, weight_D: torch.Tensor, inverse_T1: torch.Tensor
) -> torch.Tensor:
    """Gradient of RMSNorm's input; `grad_TD` is used up."""
    if _has_fused_norm(x_TD.device.type) and x_TD.dtype == weight_D.dtype:
        shape, wanted = [x_TD.shape[-1]], [True, False]
        return torch.ops.aten._fused_rms_norm_backward(grad_TD, x_TD, shape, inverse_T1, weight_D, wanted)[0]
    x32_TD = x_TD.float()
    grad32_TD = grad_TD.mul_(weight_D).float()
    with torch.autocast(x_TD.device.type, enabled=False):  # a compiled backward pass is traced under autocast
        factor_T1 = torch.linalg.vecdot(grad32_TD, x32_TD).unsqueeze(-1)
    factor_T1.mul_(inverse_T1.pow(3)).div_(-x_TD.shape[-1])
    return grad32_TD.mul_(inverse_T1).addcmul_(x32_TD, factor_T1).to(x_TD.dtype)


def _turns(
    cos: torch.Tensor, sin: torch.Tensor, rows: torch.Tensor | None, head_dim: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines for the halves of the heads of q and of k, `(B, T, 1, head_dim / 2)` each."""
    angles = [angle[..., : head_dim // 2].to(dtype).unsqueeze(-2) for angle in (cos, sin)]
    chosen = angles if rows is None else [angle.flatten(0, 1)[rows][None] for angle in angles]
    return [(chosen[0], chosen[1]), (angles[0], angles[1])]


def _rotate_(x_BTHW: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head by the position's angles, in place."""
    first, second = x_BTHW.chunk(2, dim=-1)
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(turned)
    return x_BTHW


def _groups(
    normed_TD: torch.Tensor, layers: Sequence[LoraWeights], rows: torch.Tensor | None
) -> list[tuple[torch.Tensor, Sequence[LoraWeights]]]:
    """Inputs and which of q, k and v read them: q alone where only some positions have queries."""
    if rows is None:
        return [(normed_TD, layers)]
    return [(normed_TD[rows], layers[:1]), (normed_TD, layers[1:])]


class NormProject(torch.autograd.Function):
    """RMSNorm, adapted q, k and v, and rotation of q and k: `(B, T, D)` to three `(B, heads, T, head_dim)`.

    With positions S of the queries that are wanted, the first is `(1, heads, S, head_dim)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        epsilon: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rows: torch.Tensor | None,
        head_dim: int,
        dropout: float,
        layout: Any,
        *weights: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Run the step; its arguments are those of the layer, then the weights as `Flat` has them."""
        normed_TD, _ = _normalize(x.reshape(-1, x.shape[-1]), norm_weight, epsilon)
        products: list[torch.Tensor] = []
        kept: list[torch.Tensor | None] = []
        for input_TD, layers in _groups(normed_TD, Flat(weights, layout).layers(), rows):
            found, kept_of_group = adapted_products(input_TD, layers, dropout)
            products += found
            kept += kept_of_group
        outputs: list[torch.Tensor] = []
        for number, y_TO in enumerate(products):
            leading = (1, len(y_TO)) if number == 0 and rows is not None else x.shape[:-1]
            outputs.append(y_TO.view(*leading, y_TO.shape[-1] // head_dim, head_dim))
        for output, (angle_cos, angle_sin) in zip(outputs, _turns(cos, sin, rows, head_dim, x.dtype), strict=False):
            _rotate_(output, angle_cos, angle_sin)
        ctx.save_for_backward(x, norm_weight, cos, sin, rows, *kept, *weights)
        ctx.settings = epsilon, head_dim, dropout, layout, len(kept)
        return tuple(output.transpose(1, 2) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Give the gradients of the input and of each A and B."""
        x, norm_weight, cos, sin, rows, *rest = ctx.saved_tensors
        epsilon, head_dim, dropout, layout, num_kept = ctx.settings
        kept, flat = rest[:num_kept], Flat(tuple(rest[num_kept:]), layout)
        x_TD, needs_input = x.reshape(-1, x.shape[-1]), ctx.needs_input_grad[0]
        normed_TD, inverse_T1 = _normalize(x_TD, norm_weight, epsilon)
        grads_TO: list[torch.Tensor] = []
        turns = _turns(cos, sin, rows, head_dim, x.dtype)
        for number, grad in enumerate(grad_outputs):
            grad_BTHW = grad.transpose(1, 2)
            if number < 2:
                angle_cos, angle_sin = turns[number]
                grad_BTHW = _rotate_(grad_BTHW.clone(memory_format=torch.contiguous_format), angle_cos, -angle_sin)
            grads_TO.append(grad_BTHW.reshape(-1, grad_BTHW.shape[2] * head_dim))
        found: list[Gradients] = []
        for number, (input_TD, layers) in enumerate(_groups(normed_TD, flat.layers(), rows)):
            grads, grads_TO = grads_TO[: len(layers)], grads_TO[len(layers) :]
            kept_of_group = Kept(*kept[2 * number : 2 * number + 2])
            found.append(
                adapted_gradients(grads, input_TD, layers, kept_of_group, dropout=dropout, needs_input=needs_input)
            )
        grad_normed, grad_input = found[-1].input, None
        if grad_normed is not None:
            if rows is not None and found[0].input is not None:
                grad_normed.index_add_(0, rows, found[0].input)
            grad_input = _norm_gradient(grad_normed, x_TD, norm_weight, inverse_T1).view(x.shape)
        adapters = [pair for gradients in found for pair in gradients.adapters]
        return grad_input, None, None, None, None, None, None, None, None, *flat_gradients(flat, adapters)


class LoraMLP(torch.autograd.Function):
    """`x + down(silu(gate(norm(x))) * up(norm(x)))` with adapters: `(B, T, D)` to the same shape."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        epsilon: float,
        dropout: float,
        layout: Any,
        *weights: Any,
    ) -> torch.Tensor:
        """Run the step; its arguments are those of the layer, then the weights as `Flat` has them."""
        x_TD = x.reshape(-1, x.shape[-1])
        gate, up, down = Flat(weights, layout).layers()
        normed_TD, _ = _normalize(x_TD, norm_weight, epsilon)
        (gate_TI, up_TI), kept = adapted_products(normed_TD, [gate, up], dropout)
        del normed_TD
        [y_TD], kept_down = adapted_products(F.silu(gate_TI).mul_(up_TI), [down], dropout, onto=x_TD)
        ctx.save_for_backward(x, norm_weight, gate_TI, up_TI, *kept, *kept_down, *weights)
        ctx.settings = epsilon, dropout, layout
        return y_TD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Give the gradients of the input and of each A and B."""
        x, norm_weight, gate_TI, up_TI, *rest = ctx.saved_tensors
        epsilon, dropout, layout = ctx.settings
        kept, kept_down, flat = Kept(*rest[:2]), Kept(*rest[2:4]), Flat(tuple(rest[4:]), layout)
        gate, up, down = flat.layers()
        grad_TD = grad_outputs[0].reshape(-1, x.shape[-1])
        activated_TI = F.silu(gate_TI)
        product_TI = activated_TI * up_TI
        grad_product_TI, of_down = adapted_gradients([grad_TD], product_TI, [down], kept_down, dropout=dropout)
        del product_TI
        assert grad_product_TI is not None
        grad_up_TI = activated_TI.mul_(grad_product_TI)
        grad_gate_TI = torch.ops.aten.silu_backward(grad_product_TI.mul_(up_TI), gate_TI)
        del grad_product_TI, activated_TI
        x_TD = x.reshape(-1, x.shape[-1])
        normed_TD, inverse_T1 = _normalize(x_TD, norm_weight, epsilon)
        grad_normed_TD, of_inputs = adapted_gradients(
            [grad_gate_TI, grad_up_TI],
            normed_TD,
            [gate, up],
            kept,
            dropout=dropout,
            needs_input=ctx.needs_input_grad[0],
        )
        grad_x = None
        if grad_normed_TD is not None:
            grad_x = _norm_gradient(grad_normed_TD, x_TD, norm_weight, inverse_T1).add_(grad_TD).view(x.shape)
        return grad_x, None, None, None, None, *flat_gradients(flat, [*of_inputs, *of_down])
