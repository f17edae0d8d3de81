"""The arithmetic of LoRA on frozen linear layers: forward and backward of `y = x W' + s (x A') B'`, written out.

PEFT computes the frozen product and the adapter's as separate layers: it casts the input to the dtype of the adapter's
weights, which autocast casts back, and adds the two results in further passes, each kept or copied by autograd. Here
the adapter's product is accumulated onto the frozen one where it lies, in the compute dtype, and of the intermediate
values only the low-rank one is kept. Parameters, their names and their gradients are PEFT's.

Dropout is PEFT's too: on the adapter's input, drawn anew for each layer. A mask of one byte a value is kept.

Shapes: T positions, I inputs, O outputs, R rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class LoraWeights(NamedTuple):
    """A frozen linear layer without bias and its adapter.

    Attributes:
        weight: `(O, I)`.
        down: LoRA A, `(R, I)`; None without an adapter.
        up: LoRA B, `(O, R)`; None without an adapter.
        scale: Factor of the adapter's part.
    """

    weight: torch.Tensor
    down: torch.Tensor | None
    up: torch.Tensor | None
    scale: float

    def to(self, dtype: torch.dtype) -> "LoraWeights":
        """The same in another dtype."""
        down, up = (None if matrix is None else matrix.to(dtype) for matrix in (self.down, self.up))
        return LoraWeights(self.weight.to(dtype), down, up, self.scale)


class Kept(NamedTuple):
    """What the backward pass of one adapted product needs beside its input.

    Attributes:
        low_TR: The input times A; None without an adapter.
        mask_TI: Where dropout kept the input; None without dropout.
    """

    low_TR: torch.Tensor | None
    mask_TI: torch.Tensor | None


class Gradients(NamedTuple):
    """Gradients of one adapted product; None for what has none.

    Attributes:
        input: `(T, I)`.
        down: Of A.
        up: Of B.
    """

    input: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None


def adapted_product(
    x_TI: torch.Tensor, layer: LoraWeights, dropout: float = 0.0, onto: torch.Tensor | None = None
) -> tuple[torch.Tensor, Kept]:
    """Compute `x W' + s dropout(x) A' B'`.

    Args:
        x_TI: The input, in the dtype of the weights.
        layer: The weights.
        dropout: Probability with which an input of the adapter is dropped.
        onto: `(T, O)`, added to the result; it is not changed.

    Returns:
        `(T, O)`, and what `adapted_gradients` needs.
    """
    weight_IO = layer.weight.T
    y_TO = x_TI @ weight_IO if onto is None else torch.addmm(onto, x_TI, weight_IO)
    if layer.down is None or layer.up is None:
        return y_TO, Kept(None, None)
    mask_TI = None
    if dropout > 0.0:
        mask_TI = torch.empty(x_TI.shape, dtype=torch.bool, device=x_TI.device).bernoulli_(1.0 - dropout)
    low_TR = _dropped(x_TI, mask_TI, dropout) @ layer.down.T
    return y_TO.addmm_(low_TR, layer.up.T, alpha=layer.scale), Kept(low_TR, mask_TI)


def adapted_gradients(
    grad_TO: torch.Tensor,
    x_TI: torch.Tensor,
    layer: LoraWeights,
    kept: Kept,
    *,
    dropout: float = 0.0,
    onto: torch.Tensor | None = None,
    needs_input: bool = True,
) -> Gradients:
    """Compute the gradients of `adapted_product`.

    Args:
        grad_TO: Gradient of the result.
        x_TI: The input.
        layer: The weights.
        kept: What `adapted_product` returned.
        dropout: As there.
        onto: `(T, I)` to which the gradient of the input is added, in place.
        needs_input: Whether the gradient of the input is wanted.
    """
    grad_x = onto
    if needs_input:
        grad_x = grad_TO @ layer.weight if onto is None else onto.addmm_(grad_TO, layer.weight)
    if layer.down is None or layer.up is None or kept.low_TR is None:
        return Gradients(grad_x, None, None)
    grad_up = (grad_TO.T @ kept.low_TR).mul_(layer.scale)
    grad_low_TR = (grad_TO @ layer.up).mul_(layer.scale)
    grad_down = grad_low_TR.T @ _dropped(x_TI, kept.mask_TI, dropout)
    if grad_x is not None and needs_input:
        if kept.mask_TI is None:
            grad_x.addmm_(grad_low_TR, layer.down)
        else:
            grad_x.add_(_dropped(grad_low_TR @ layer.down, kept.mask_TI, dropout))
    return Gradients(grad_x, grad_down, grad_up)


def _dropped(values: torch.Tensor, mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return values if mask is None else (values * mask).mul_(1.0 / (1.0 - dropout))


class Flat(NamedTuple):
    """Weights of several layers as the flat arguments of an autograd function.

    Attributes:
        tensors: Weight, A and B of each layer in turn; None for an adapter that is not there.
        scales: Scale of each layer.
    """

    tensors: tuple[torch.Tensor | None, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, layers: Sequence[LoraWeights]) -> "Flat":
        """Flatten."""
        return cls(tuple(part for layer in layers for part in layer[:3]), tuple(layer.scale for layer in layers))

    def layers(self, dtype: torch.dtype) -> list[LoraWeights]:
        """The layers again, in a dtype."""
        found: list[LoraWeights] = []
        for number, scale in enumerate(self.scales):
            weight, down, up = self.tensors[3 * number : 3 * number + 3]
            assert weight is not None
            found.append(LoraWeights(weight, down, up, scale).to(dtype))
        return found


def flat_gradients(flat: Flat, gradients: Sequence[Gradients]) -> list[torch.Tensor | None]:
    """Gradients of `Flat.tensors`: none for frozen weights, those of A and B in their own dtypes."""
    found: list[torch.Tensor | None] = []
    for number, (_, *pair) in enumerate(gradients):
        found.append(None)
        for parameter, gradient in zip(flat.tensors[3 * number + 1 : 3 * number + 3], pair, strict=True):
            found.append(None if parameter is None or gradient is None else gradient.to(parameter.dtype))
    return found


class LoraProduct(torch.autograd.Function):
    """One adapted linear layer, added to a residual if there is one."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, scale: float, dropout: float, *weights: Any
    ) -> torch.Tensor:
        """Run the layer; see `adapted_product`."""
        flat = Flat(weights, (scale,))
        [layer] = flat.layers(x.dtype)
        x_TI = x.reshape(-1, x.shape[-1])
        onto = None if residual is None else residual.reshape(-1, residual.shape[-1])
        y_TO, kept = adapted_product(x_TI, layer, dropout, onto)
        ctx.save_for_backward(x, *kept, *weights)
        ctx.settings = scale, dropout
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Give the gradients of the input, the residual, A and B."""
        x, low, mask, *weights = ctx.saved_tensors
        scale, dropout = ctx.settings
        flat = Flat(tuple(weights), (scale,))
        [layer] = flat.layers(x.dtype)
        grad = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        needs_input, x_TI = ctx.needs_input_grad[0], x.reshape(-1, x.shape[-1])
        gradients = adapted_gradients(grad, x_TI, layer, Kept(low, mask), dropout=dropout, needs_input=needs_input)
        grad_x = None if gradients.input is None else gradients.input.view(x.shape)
        grad_residual = grad_outputs[0] if ctx.needs_input_grad[1] else None
        return grad_x, grad_residual, None, None, *flat_gradients(flat, [gradients])
