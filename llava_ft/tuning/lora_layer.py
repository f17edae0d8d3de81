"""A decoder layer of LLaMA with adapters in three steps that each keep little: attention's inputs, its output, the MLP.

What autograd keeps of such a layer when it sees single operations is several times what the gradients need. Here each
step is one function with its backward pass written out:

| step | keeps, beside low-rank values | computes again in the backward pass |
| --- | --- | --- |
| norm, q, k, v, rotation | its input | the norm |
| o, residual | its input, which attention keeps too | |
| norm, gate, up, SwiGLU, down, residual | its input, gate, up | the norm, SwiGLU |

Modules and parameters are those of transformers and PEFT. Where a layer is not what these functions compute - weights
in 4 bits, biases, DoRA, several adapters, trained norms - its own modules run as before.

Shapes: B samples, T positions (B T of them in flat tensors), D width, I width inside the MLP.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from llava_ft.models.decoder import LastDecoderLayer, SelectiveAttention, attend, rows_of, takes_chosen_queries
from llava_ft.models.precision import compute_dtype
from llava_ft.tuning.lora_linear import (
    Flat,
    Gradients,
    Kept,
    LoraProduct,
    LoraWeights,
    adapted_gradients,
    adapted_product,
    flat_gradients,
)

_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


class LoraDecoderLayer(LastDecoderLayer):
    """A decoder layer that computes as this module's text says where it can.

    It reads its linear layers' weights without calling them, so ZeRO-3 has to gather those of the layer together.
    """

    _z3_leaf = True

    def forward(
        self, hidden_states: torch.Tensor, *, read_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Run the layer; see `LastDecoderLayer.forward`. `read_positions` are the last layer's alone."""
        if self.self_attn.layer_idx != self.self_attn.config.num_hidden_layers - 1:
            read_positions = None
        weights = None if kwargs.get("past_key_values") is not None else _weights_of(self, hidden_states)
        if weights is None or kwargs.get("output_attentions"):
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
            flat.scales,
            *flat.tensors,
        )
        attended, _ = attend(attention, query, key, value, **kwargs)
        attended = attended.flatten(2)
        if read_positions is not None:
            hidden_states = rows_of(hidden_states, read_positions)
            if query_rows is None:
                attended = rows_of(attended, read_positions)
        o_proj = layers[3]
        hidden_states = LoraProduct.apply(attended, hidden_states, o_proj.scale, dropout, *o_proj[:3])
        flat, norm = Flat.of(layers[4:]), self.post_attention_layernorm
        return LoraMLP.apply(hidden_states, norm.weight, norm.variance_epsilon, dropout, flat.scales, *flat.tensors)


def use_fast_layers(model: nn.Module) -> int:
    """Let the decoder layers of a model with adapters compute as `LoraDecoderLayer`; returns how many."""
    count = 0
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer) and module.mlp.config.hidden_act == "silu":
            module.__class__ = LoraDecoderLayer
            module.self_attn.__class__ = SelectiveAttention
            count += 1
    return count


def _weights_of(layer: LlamaDecoderLayer, hidden: torch.Tensor) -> tuple[float, list[LoraWeights]] | None:
    """The dropout and the weights of the seven linear layers; None where they are not plain frozen layers with LoRA."""
    norms: tuple[Any, ...] = (layer.input_layernorm, layer.post_attention_layernorm)
    if any(type(norm) is not LlamaRMSNorm or norm.weight.requires_grad for norm in norms):
        return None
    found: list[LoraWeights] = []
    dropouts: set[float] = set()
    for parent, names in ((layer.self_attn, _ATTENTION_LINEARS), (layer.mlp, _MLP_LINEARS)):
        for name in names:
            weights = _linear_weights(getattr(parent, name), dropouts)
            if weights is None:
                return None
            found.append(weights)
    dtype = compute_dtype(hidden)
    is_autocast = torch.is_autocast_enabled(hidden.device.type)
    if hidden.dtype != found[0].weight.dtype and not is_autocast:
        return None
    if is_autocast and hidden.dtype != dtype:
        return None
    return (max(dropouts, default=0.0), found) if len(dropouts) <= 1 else None


def _linear_weights(module: nn.Module, dropouts: set[float]) -> LoraWeights | None:
    base = module.base_layer if type(module) is PeftLinear else module
    if type(base) is not nn.Linear or base.bias is not None:
        return None
    if base.weight.requires_grad:
        return None
    if base is module:
        return LoraWeights(base.weight, None, None, 0.0)
    assert isinstance(module, PeftLinear)
    if module.disable_adapters or module.merged:
        return LoraWeights(base.weight, None, None, 0.0)
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.lora_variant or module.fan_in_fan_out or any(module.lora_bias.values()):
        return None
    [name] = names
    dropout = module.lora_dropout[name]
    if isinstance(dropout, nn.Dropout):
        dropouts.add(dropout.p if dropout.training else 0.0)
    elif not isinstance(dropout, nn.Identity):
        return None
    adapter: tuple[Any, Any] = module.lora_A[name], module.lora_B[name]
    return LoraWeights(base.weight, adapter[0].weight, adapter[1].weight, module.scaling[name])


def _normalize(x_TD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm: the result in the dtype of `x`, and the inverse root of the mean square, `(T, 1)` float32."""
    x32_TD = x_TD.float()
    mean_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True).square_().div_(x_TD.shape[-1])
    inverse_T1 = mean_T1.add_(epsilon).rsqrt_()
    return (x32_TD * inverse_T1).to(x_TD.dtype).mul_(weight_D), inverse_T1


def _norm_gradient(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, weight_D: torch.Tensor, inverse_T1: torch.Tensor
) -> torch.Tensor:
    """Gradient of RMSNorm's input; `grad_TD` is used up."""
    x32_TD = x_TD.float()
    grad32_TD = grad_TD.mul_(weight_D).float()
    factor_T1 = torch.linalg.vecdot(grad32_TD, x32_TD).unsqueeze(-1).mul_(inverse_T1.pow(3)).div_(-x_TD.shape[-1])
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
        scales: tuple[float, ...],
        *weights: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Run the step; its arguments are those of the layer, then the weights as `Flat` has them."""
        normed_TD, _ = _normalize(x.reshape(-1, x.shape[-1]), norm_weight, epsilon)
        turns = _turns(cos, sin, rows, head_dim, x.dtype)
        outputs, kept = [], []
        for number, layer in enumerate(Flat(weights, scales).layers(x.dtype)):
            is_chosen = number == 0 and rows is not None
            y_TO, kept_of_layer = adapted_product(normed_TD[rows] if is_chosen else normed_TD, layer, dropout)
            output = y_TO.view(*((1, len(y_TO)) if is_chosen else x.shape[:-1]), y_TO.shape[-1] // head_dim, head_dim)
            outputs.append(_rotate_(output, *turns[number]) if number < 2 else output)
            kept += kept_of_layer
        ctx.save_for_backward(x, norm_weight, cos, sin, rows, *kept, *weights)
        ctx.settings = epsilon, head_dim, dropout, scales
        return tuple(output.transpose(1, 2) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Give the gradients of the input and of each A and B."""
        x, norm_weight, cos, sin, rows, *rest = ctx.saved_tensors
        epsilon, head_dim, dropout, scales = ctx.settings
        kept, flat = rest[:6], Flat(tuple(rest[6:]), scales)
        x_TD = x.reshape(-1, x.shape[-1])
        normed_TD, inverse_T1 = _normalize(x_TD, norm_weight, epsilon)
        turns = _turns(cos, sin, rows, head_dim, x.dtype)
        layers, needs_input = flat.layers(x.dtype), ctx.needs_input_grad[0]
        grad_normed: torch.Tensor | None = None
        gradients: list[Gradients] = []
        for number in (2, 1, 0):
            grad_BTHW = grad_outputs[number].transpose(1, 2)
            if number < 2:
                angle_cos, angle_sin = turns[number]
                grad_BTHW = _rotate_(grad_BTHW.clone(memory_format=torch.contiguous_format), angle_cos, -angle_sin)
            chosen = rows if number == 0 else None
            found = adapted_gradients(
                grad_BTHW.reshape(-1, layers[number].weight.shape[0]),
                normed_TD if chosen is None else normed_TD[chosen],
                layers[number],
                Kept(*kept[2 * number : 2 * number + 2]),
                dropout=dropout,
                onto=grad_normed if chosen is None else None,
                needs_input=needs_input,
            )
            if chosen is None:
                grad_normed = found.input
            elif grad_normed is not None and found.input is not None:
                grad_normed.index_add_(0, chosen, found.input)
            gradients.insert(0, found)
        grad_input = None
        if needs_input and grad_normed is not None:
            grad_input = _norm_gradient(grad_normed, x_TD, norm_weight, inverse_T1).view(x.shape)
        return grad_input, None, None, None, None, None, None, None, None, *flat_gradients(flat, gradients)


class LoraMLP(torch.autograd.Function):
    """`x + down(silu(gate(norm(x))) * up(norm(x)))` with adapters: `(B, T, D)` to the same shape."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        epsilon: float,
        dropout: float,
        scales: tuple[float, ...],
        *weights: Any,
    ) -> torch.Tensor:
        """Run the step; its arguments are those of the layer, then the weights as `Flat` has them."""
        x_TD = x.reshape(-1, x.shape[-1])
        gate, up, down = Flat(weights, scales).layers(x.dtype)
        normed_TD, _ = _normalize(x_TD, norm_weight, epsilon)
        gate_TI, kept_gate = adapted_product(normed_TD, gate, dropout)
        up_TI, kept_up = adapted_product(normed_TD, up, dropout)
        del normed_TD
        y_TD, kept_down = adapted_product(F.silu(gate_TI).mul_(up_TI), down, dropout, onto=x_TD)
        ctx.save_for_backward(x, norm_weight, gate_TI, up_TI, *kept_gate, *kept_up, *kept_down, *weights)
        ctx.settings = epsilon, dropout, scales
        return y_TD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Give the gradients of the input and of each A and B."""
        x, norm_weight, gate_TI, up_TI, *rest = ctx.saved_tensors
        epsilon, dropout, scales = ctx.settings
        kept, flat = [Kept(*rest[i : i + 2]) for i in (0, 2, 4)], Flat(tuple(rest[6:]), scales)
        gate, up, down = flat.layers(x.dtype)
        grad_TD = grad_outputs[0].reshape(-1, x.shape[-1])
        activated_TI = F.silu(gate_TI)
        product_TI = activated_TI * up_TI
        of_down = adapted_gradients(grad_TD, product_TI, down, kept[2], dropout=dropout)
        del product_TI
        grad_product_TI = of_down.input
        assert grad_product_TI is not None
        grad_up_TI = activated_TI.mul_(grad_product_TI)
        grad_gate_TI = torch.ops.aten.silu_backward(grad_product_TI.mul_(up_TI), gate_TI)
        del grad_product_TI, activated_TI
        of_down = of_down._replace(input=None)
        x_TD = x.reshape(-1, x.shape[-1])
        normed_TD, inverse_T1 = _normalize(x_TD, norm_weight, epsilon)
        needs_input = ctx.needs_input_grad[0]
        of_gate = adapted_gradients(grad_gate_TI, normed_TD, gate, kept[0], dropout=dropout, needs_input=needs_input)
        of_up = adapted_gradients(
            grad_up_TI, normed_TD, up, kept[1], dropout=dropout, onto=of_gate.input, needs_input=needs_input
        )
        grad_x = None
        if needs_input and of_up.input is not None:
            grad_x = _norm_gradient(of_up.input, x_TD, norm_weight, inverse_T1).add_(grad_TD).view(x.shape)
        return grad_x, None, None, None, None, *flat_gradients(flat, [of_gate, of_up, of_down])
