"""The loss over supervised positions, without the logits of a whole batch.

The output layer of a language model is its widest: at 32,000 words the float32 logits of 2,048 positions take 262 MB,
and cross-entropy keeps them several times. Here they are computed for the positions that have a target, a chunk at a
time; each chunk's gradient is computed while its logits are there, so the backward pass only scales what is kept: one
vector for each supervised position, and the gradient of the output matrix if that is trained.

The loss is computed by the head itself, called as a module with targets: where ZeRO-3 has divided the matrix, it is
gathered once a step on every rank, however many chunks a rank has.

Shapes: S supervised positions, D width, V vocabulary, C positions of a chunk.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from llava_ft.constants import IGNORE_INDEX
from llava_ft.models.precision import compute_dtype

CPU_CHUNK: Final = 2**22
"""Logits computed at a time on a CPU: 16 MiB in float32."""

GPU_CHUNK: Final = 2**26
"""Logits computed at a time on a GPU: 256 MiB in float32, enough rows to fill it."""


class LossHead(nn.Linear):
    """A language-model head without bias that returns logits, or, with targets, their summed cross-entropy."""

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """The output matrix, as matrices of width D whose rows together are the vocabulary."""
        return (self.weight,)

    def forward(self, input: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Map hidden states to logits, or to the loss.

        Args:
            input: `(..., D)`; `(S, D)` with targets.
            targets: `(S,)` int64 vocabulary entries.

        Returns:
            `(..., V)` logits in the dtype of `input`; with targets the sum of their cross-entropies, float32.
        """
        if targets is None:
            return self.logits(input)
        matrices = self.matrices()
        fused = fused_kernel(input, matrices, targets)
        if fused is not None:
            return fused(input, matrices[0], targets, reduction="sum").float()
        return _ChunkedCrossEntropy.apply(input, targets, *matrices)

    def logits(self, input: torch.Tensor) -> torch.Tensor:
        """Map `(..., D)` to logits `(..., V)`."""
        return F.linear(input, self.weight)


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Find the positions whose next token is supervised.

    Args:
        labels: `(B, T)` int64, `IGNORE_INDEX` where nothing is supervised.

    Returns:
        `(S,)` int64 positions in the flattened batch. The target of position p is label p + 1.
    """
    has_target_BT = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    return has_target_BT.flatten().nonzero()[:, 0]


def supervised_loss(hidden_SD: torch.Tensor, head: nn.Module, targets_S: torch.Tensor) -> torch.Tensor:
    """Sum the cross-entropies of supervised positions.

    Args:
        hidden_SD: `(S, D)` hidden states of the positions that predict a target.
        head: The output layer: a `LossHead`, or a module that maps `(S, D)` to logits, which are then all computed.
        targets_S: `(S,)` int64 vocabulary entries.

    Returns:
        A float32 number; 0 with zero gradients when S is 0.
    """
    if isinstance(head, LossHead):
        return head(hidden_SD, targets_S)
    return F.cross_entropy(head(hidden_SD).float(), targets_S, reduction="sum")


def mean_loss(
    hidden_SD: torch.Tensor, head: nn.Module, targets_S: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Average the cross-entropies of supervised positions; see `supervised_loss`.

    Args:
        hidden_SD: `(S, D)`.
        head: The output layer.
        targets_S: `(S,)`.
        num_items: Number by which the sum is divided; by default S.
    """
    total = supervised_loss(hidden_SD, head, targets_S)
    if isinstance(num_items, torch.Tensor):
        return total / num_items.to(total.device).clamp(min=1)
    return total / max(len(targets_S) if num_items is None else num_items, 1)


def fused_kernel(
    hidden_SD: torch.Tensor, matrices: Sequence[torch.Tensor], targets_S: torch.Tensor
) -> Callable[..., torch.Tensor] | None:
    """Liger's fused linear cross-entropy where it is installed and does the same: on a GPU, with one output matrix."""
    if not hidden_SD.is_cuda or len(matrices) != 1 or len(targets_S) == 0:
        return None
    try:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports] - needs a GPU
            liger_fused_linear_cross_entropy,
        )
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ cat(matrices).T`."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: torch.Tensor, targets_S: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        dtype = compute_dtype(hidden_SD)
        needs_hidden, needs_matrix = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        in_dtype = [matrix.detach().to(dtype) for matrix in matrices]
        grad_SD = torch.empty_like(hidden_SD, dtype=dtype) if needs_hidden else None
        grads = [
            torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device) if needed else None
            for matrix, needed in zip(matrices, needs_matrix, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden_SD.device)
        limit = GPU_CHUNK if hidden_SD.is_cuda else CPU_CHUNK
        rows = max(1, limit // sum(len(matrix) for matrix in matrices))
        for start in range(0, len(targets_S), rows):
            chunk_CD, targets_C = hidden_SD[start : start + rows].to(dtype), targets_S[start : start + rows]
            parts = [chunk_CD @ matrix.T for matrix in in_dtype]
            logits_CV = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).float()
            del parts
            largest_C1 = logits_CV.amax(dim=-1, keepdim=True)
            target_C1 = logits_CV.gather(1, targets_C[:, None])
            exponentials_CV = logits_CV.sub_(largest_C1).exp_()
            sums_C1 = exponentials_CV.sum(dim=-1, keepdim=True)
            total += (sums_C1.log() + largest_C1 - target_C1).sum()
            if not (needs_hidden or any(needs_matrix)):
                continue
            probabilities_CV = exponentials_CV.div_(sums_C1)
            probabilities_CV.scatter_add_(1, targets_C[:, None], -torch.ones_like(sums_C1))
            grad_logits = probabilities_CV.to(dtype).split([len(matrix) for matrix in matrices], dim=-1)
            if grad_SD is not None:
                grad_CD = grad_logits[0] @ in_dtype[0]
                for grad_CK, matrix_KD in zip(grad_logits[1:], in_dtype[1:], strict=True):
                    grad_CD.addmm_(grad_CK, matrix_KD)
                grad_SD[start : start + rows] = grad_CD
            for grad_KD, grad_CK in zip(grads, grad_logits, strict=True):
                if grad_KD is not None:
                    _add_product(grad_KD, grad_CK.T, chunk_CD)
        ctx.save_for_backward(grad_SD, *grads)
        ctx.dtypes = [hidden_SD.dtype, *(matrix.dtype for matrix in matrices)]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        grads = [
            None if grad is None else (grad * grad_outputs[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return grads[0], None, *grads[1:]


def _add_product(total_KD: torch.Tensor, left_KC: torch.Tensor, right_CD: torch.Tensor) -> None:
    """Add a product of matrices to a float32 sum."""
    if left_KC.dtype == torch.float32:
        total_KD.addmm_(left_KC, right_CD)
    else:
        total_KD += left_KC @ right_CD
