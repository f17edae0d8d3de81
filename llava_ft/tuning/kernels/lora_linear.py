"""The arithmetic of LoRA on frozen linear layers: forward and backward of `y = x W' + s (x A') B'`, written out.

PEFT computes the frozen product and the adapter's as separate layers: it casts the input to the dtype of the adapter's
weights, which autocast casts back, and adds the two results in further passes, each kept or copied by autograd. Here
the adapter's product is accumulated onto the frozen one where it lies, in the compute dtype, and of the intermediate
values only the low-rank one is kept. Layers that read the same input (q, k and v; gate and up) have their A's joined to
one matrix, so that the input is read once for all of them, and so in the backward pass. Parameters, their names and
their gradients are PEFT's.

Dropout is PEFT's too: on the adapter's input, drawn anew for each layer. A mask of one byte a value is kept, and A's
are multiplied one by one.

Shapes: T positions, I inputs, O outputs, R rank, S sum of the ranks of layers with one input, L layers with an adapter.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llava_ft.tuning.kernels.lora_weights import Flat, LoraWeights


class Kept(NamedTuple):
    """What the backward pass of adapted products needs beside their input."""

    low_TS: torch.Tensor | None  # the input times each A; None without adapters
    mask_LTI: torch.Tensor | None  # where dropout kept the input of each adapter; None without dropout


class Gradients(NamedTuple):
    """Gradients of adapted products; None for what has none."""

    input: torch.Tensor | None  # (T, I)
    adapters: list[tuple[torch.Tensor | None, torch.Tensor | None]]  # of A and B, for each layer


def adapted_products(
    x_TI: torch.Tensor, layers: Sequence[LoraWeights], dropout: float = 0.0, onto: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], Kept]:
    """Compute `x W' + s dropout(x) A' B'` for layers that read the same input.

    Args:
        x_TI: The input. Products are computed in its dtype.
        layers: The layers.
        dropout: Probability with which an input of an adapter is dropped.
        onto: `(T, O)`, added to each result; it is not changed.

    Returns:
        `(T, O)` for each layer, and what `adapted_gradients` needs.
    """
    mask_LTI, low_TS = None, None
    down_SI = _joined_down(layers, x_TI.dtype)
    if down_SI is not None and dropout > 0.0:
        adapted = [layer.rank for layer in layers if layer.rank]
        mask_LTI = torch.empty((len(adapted), *x_TI.shape), dtype=torch.bool, device=x_TI.device)
        mask_LTI.bernoulli_(1.0 - dropout)
        downs = zip(mask_LTI, down_SI.split(adapted), strict=True)
        low_TS = torch.cat([_dropped(x_TI, mask_TI, dropout) @ down_RI.T for mask_TI, down_RI in downs], dim=1)
    elif down_SI is not None:
        low_TS = x_TI @ down_SI.T
    outputs: list[torch.Tensor] = []
    start = 0
    for layer in layers:
        weight_IO = layer.frozen(x_TI.dtype).T
        y_TO = x_TI @ weight_IO if onto is None else torch.addmm(onto, x_TI, weight_IO)
        del weight_IO
        if low_TS is not None and layer.up is not None:
            low_TR = low_TS[:, start : start + layer.rank]
            y_TO.addmm_(low_TR, layer.up.to(x_TI.dtype).T, alpha=layer.scale)
        start += layer.rank
        outputs.append(y_TO)
    return outputs, Kept(low_TS, mask_LTI)


def adapted_gradients(
    grads_TO: Sequence[torch.Tensor],
    x_TI: torch.Tensor,
    layers: Sequence[LoraWeights],
    kept: Kept,
    *,
    dropout: float = 0.0,
    needs_input: bool = True,
) -> Gradients:
    """Compute the gradients of `adapted_products`.

    Args:
        grads_TO: Gradient of each result.
        x_TI: The input.
        layers: The layers.
        kept: What `adapted_products` returned.
        dropout: As there.
        needs_input: Whether the gradient of the input is wanted.
    """
    grad_x: torch.Tensor | None = None
    grad_low_TS = None if kept.low_TS is None else torch.empty_like(kept.low_TS)
    grad_ups: list[torch.Tensor | None] = []
    start = 0
    for grad_TO, layer in zip(grads_TO, layers, strict=True):
        if needs_input:
            weight_OI = layer.frozen(x_TI.dtype)
            grad_x = grad_TO @ weight_OI if grad_x is None else grad_x.addmm_(grad_TO, weight_OI)
            del weight_OI
        if kept.low_TS is None or grad_low_TS is None or layer.up is None:
            grad_ups.append(None)
            continue
        place = slice(start, start + layer.rank)
        start += layer.rank
        grad_ups.append(_scaled_product(grad_TO.T, kept.low_TS[:, place], layer.scale))
        grad_low_TS[:, place] = _scaled_product(grad_TO, layer.up.to(x_TI.dtype), layer.scale)
    grad_downs, grad_x = _through_down(grad_low_TS, x_TI, layers, grad_x, kept.mask_LTI, dropout)
    return Gradients(grad_x, list(zip(grad_downs, grad_ups, strict=True)))


def _through_down(
    grad_low_TS: torch.Tensor | None,
    x_TI: torch.Tensor,
    layers: Sequence[LoraWeights],
    grad_x: torch.Tensor | None,
    mask_LTI: torch.Tensor | None,
    dropout: float,
) -> tuple[list[torch.Tensor | None], torch.Tensor | None]:
    """Gradients of the A's, and `grad_x` with what flows through them added to it, in place, if it is there."""
    down_SI = _joined_down(layers, x_TI.dtype)
    if grad_low_TS is None or down_SI is None:
        return [None] * len(layers), grad_x
    ranks = [layer.rank for layer in layers if layer.rank]
    if mask_LTI is None:
        found = list((grad_low_TS.T @ x_TI).split(ranks))
        if grad_x is not None:
            grad_x.addmm_(grad_low_TS, down_SI)
    else:
        found = []
        parts = zip(grad_low_TS.split(ranks, dim=1), down_SI.split(ranks), mask_LTI, strict=True)
        for grad_low_TR, down_RI, mask_TI in parts:
            found.append(grad_low_TR.T @ _dropped(x_TI, mask_TI, dropout))
            if grad_x is not None:
                grad_x.add_(_dropped(grad_low_TR @ down_RI, mask_TI, dropout))
    return [found.pop(0) if layer.rank else None for layer in layers], grad_x


def _joined_down(layers: Sequence[LoraWeights], dtype: torch.dtype) -> torch.Tensor | None:
    """A of all layers one below the other, `(S, I)`, in a dtype; None without adapters."""
    downs = [layer.down for layer in layers if layer.down is not None]
    if not downs:
        return None
    if len(downs) == 1:
        return downs[0].to(dtype)
    ranks = [len(down) for down in downs]
    joined_SI = downs[0].new_empty((sum(ranks), downs[0].shape[1]), dtype=dtype)
    for place, down in zip(joined_SI.split(ranks), downs, strict=True):
        place.copy_(down)
    return joined_SI


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * left @ right`, without a pass of its own for the scale."""
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=scale)


def _dropped(values: torch.Tensor, mask: torch.Tensor, dropout: float) -> torch.Tensor:
    return (values * mask).mul_(1.0 / (1.0 - dropout))


def flat_gradients(
    flat: Flat, adapters: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]]
) -> list[torch.Tensor | None]:
    """Gradients of `Flat.tensors`: none for frozen weights, those of A and B in their own dtypes."""
    found: list[torch.Tensor | None] = []
    for layer, gradients in zip(flat.layers(), adapters, strict=True):
        found += [None] * len(layer.weight)
        for parameter, gradient in zip((layer.down, layer.up), gradients, strict=True):
            found.append(None if parameter is None or gradient is None else gradient.to(parameter.dtype))
    return found


class LoraProduct(torch.autograd.Function):
    """One adapted linear layer, added to a residual if there is one."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, dropout: float, layout: Any, *weights: Any
    ) -> torch.Tensor:
        """Run the layer; see `adapted_products`. Layout and weights are those of `Flat`."""
        x_TI = x.reshape(-1, x.shape[-1])
        onto = None if residual is None else residual.reshape(-1, residual.shape[-1])
        [y_TO], kept = adapted_products(x_TI, Flat(weights, layout).layers(), dropout, onto)
        ctx.save_for_backward(x, *kept, *weights)
        ctx.settings = dropout, layout
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Give the gradients of the input, the residual, A and B."""
        x, low, mask, *weights = ctx.saved_tensors
        dropout, layout = ctx.settings
        flat = Flat(tuple(weights), layout)
        grad = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        needs_input, x_TI = ctx.needs_input_grad[0], x.reshape(-1, x.shape[-1])
        gradients = adapted_gradients(
            [grad], x_TI, flat.layers(), Kept(low, mask), dropout=dropout, needs_input=needs_input
        )
        grad_x = None if gradients.input is None else gradients.input.view(x.shape)
        grad_residual = grad_outputs[0] if ctx.needs_input_grad[1] else None
        return grad_x, grad_residual, None, None, *flat_gradients(flat, gradients.adapters)
