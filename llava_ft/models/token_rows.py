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

    def __init__(self, frozen: nn.Embedding, num_new: int):
        super().__init__(frozen.num_embeddings, frozen.embedding_dim, device="meta")
        self.weight = frozen.weight
        self.new_rows = last_rows(frozen.weight, num_new)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up `(B, T)` ids; returns `(B, T, D)` in the dtype of the frozen matrix."""
        first_new = self.num_embeddings - self.new_rows.shape[0]
        embeds = F.embedding(input, self.weight)
        new_embeds = F.embedding((input - first_new).clamp(min=0), self.new_rows).to(embeds.dtype)
        return torch.where((input >= first_new).unsqueeze(-1), new_embeds, embeds)


class HeadWithNewRows(LossHead):
    """A language-model head without bias whose last K outputs come from the parameter `new_rows`, `(K, D)`."""

    def __init__(self, frozen: nn.Linear, new_rows: nn.Parameter):
        super().__init__(frozen.in_features, frozen.out_features, bias=False, device="meta")
        self.weight = frozen.weight
        self.new_rows = new_rows

    def matrices(self) -> tuple[torch.Tensor, ...]:
        """The frozen rows, `(V - K, D)`, and the trained ones, `(K, D)`."""
        return self.weight[: self.out_features - self.new_rows.shape[0]], self.new_rows

    def logits(self, input: torch.Tensor) -> torch.Tensor:
        """Map `(..., D)` to logits `(..., V)`."""
        old_rows, new_rows = self.matrices()
        return torch.cat([F.linear(input, old_rows), F.linear(input, new_rows.to(input.dtype))], dim=-1)


def last_rows(weight: torch.Tensor, num_new: int) -> nn.Parameter:
    """Make a trainable float32 copy of the last rows of a matrix, `(num_new, D)`."""
    return nn.Parameter(weight.detach()[-num_new:].to(torch.float32, copy=True))
