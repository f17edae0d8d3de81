"""Trainable rows for new vocabulary entries on top of a frozen embedding and head.

`mm_use_im_start_end` and `mm_use_im_patch_token` add two or three entries to the vocabulary. When the language model
is frozen (LoRA, projector pretraining) only their rows are to be trained: training the whole matrices would cost
gigabytes of optimizer state and change every word. So the rows live in a small float32 parameter `new_rows` of the
embedding (and of the head) and stand in for the last rows of the frozen matrix.

Differs from LLaVA, which trains the whole input embedding while pretraining and loses the rows of a LoRA run.
"""

import torch
import torch.nn.functional as F
from torch import nn

from llava_ft.models.loss import LossHead


class EmbeddingWithNewRows(nn.Embedding):
    """An embedding whose last K rows are the parameter `new_rows`, `(K, D)` float32."""

    new_rows: nn.Parameter

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up `(B, T)` ids; returns `(B, T, D)` in the dtype of the frozen matrix."""
        first_new = self.num_embeddings - self.new_rows.shape[0]
        embeds = F.embedding(input, self.weight)
        new_embeds = F.embedding((input - first_new).clamp(min=0), self.new_rows).to(embeds.dtype)
        return torch.where((input >= first_new).unsqueeze(-1), new_embeds, embeds)


class HeadWithNewRows(LossHead):
    """A language-model head without bias whose last K outputs come from the parameter `new_rows`, `(K, D)`."""

    new_rows: nn.Parameter

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """The frozen rows, `(V - K, D)`, and the trained ones, `(K, D)`."""
        return self.weight[: self.out_features - self.new_rows.shape[0]], self.new_rows

    def logits(self, input: torch.Tensor) -> torch.Tensor:
        """Map `(..., D)` to logits `(..., V)`."""
        old_rows, new_rows = self.matrices()
        return torch.cat([F.linear(input, old_rows), F.linear(input, new_rows.to(input.dtype))], dim=-1)


def add_new_rows(module: nn.Embedding | nn.Linear, num_new: int) -> nn.Parameter:
    """Make the last `num_new` rows of an embedding or head a parameter of their own, starting from their values.

    The module keeps its place and its `weight`, so names on disk do not change.

    Returns:
        The new parameter, `(num_new, D)` float32, trainable.
    """
    rows = nn.Parameter(module.weight.detach()[-num_new:].to(torch.float32, copy=True))
    if isinstance(module, nn.Embedding):
        module.__class__ = EmbeddingWithNewRows
    else:
        module.__class__ = HeadWithNewRows
    module.register_parameter("new_rows", rows)
    return rows


@torch.no_grad()
def fold_new_rows(module: nn.Embedding | nn.Linear) -> None:
    """Write `new_rows` into the last rows of `weight`, in its dtype. Does nothing for an ordinary module."""
    if isinstance(module, EmbeddingWithNewRows | HeadWithNewRows):
        module.weight[-module.new_rows.shape[0] :].copy_(module.new_rows)
