"""The last layer of the decoder, computed only where its output is read.

While training, the loss reads the last hidden state at supervised positions alone. Keys and values of the last layer
are needed everywhere, since later positions attend to them; everything behind its attention - output projection, MLP,
final norm - is not. In a model of 8 layers with one position in seven supervised that is a twelfth of the decoder's
work, in one of 32 layers a fiftieth.

Shapes: B samples, T positions, D width, H heads, W width of a head, S positions that are read.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from llava_ft.models.attention import kernels
from llava_ft.models.kernels import ReadsChosenPositions


class SelectiveAttention(LlamaAttention):
    """Attention whose output can be asked for at chosen positions."""

    def forward(
        self, hidden_states: torch.Tensor, *, read_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend as `LlamaAttention` does.

        Args:
            hidden_states: `(B, T, D)`.
            read_positions: `(S,)` int64, positions in the flattened batch whose output is wanted; None is all.
            **kwargs: For `LlamaAttention`.

        Returns:
            `(B, T, D)`, or `(1, S, D)` with `read_positions`; and the attention weights, where the kernel has them.
        """
        if read_positions is None:
            return super().forward(hidden_states, **kwargs)
        cos, sin = kwargs.pop("position_embeddings")
        asked, query_cos, query_sin = hidden_states, cos, sin
        if takes_chosen_queries(self, hidden_states, kwargs.get("attention_mask")):
            asked, query_cos, query_sin = (rows_of(tensor, read_positions) for tensor in (hidden_states, cos, sin))
            kwargs["query_positions"] = read_positions
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in ((self.q_proj, asked), (self.k_proj, hidden_states), (self.v_proj, hidden_states))
        )
        query, _ = apply_rotary_pos_emb(query, query, query_cos, query_sin)
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        output_BTHW, weights = attend(self, query, key, value, **kwargs)
        output_BTD = output_BTHW.flatten(2)
        return self.o_proj(output_BTD if asked is not hidden_states else rows_of(output_BTD, read_positions)), weights


class LastDecoderLayer(ReadsChosenPositions, LlamaDecoderLayer):
    """A decoder layer whose output can be asked for at chosen positions."""

    def forward(
        self, hidden_states: torch.Tensor, *, read_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            hidden_states: `(B, T, D)`.
            read_positions: `(S,)` int64, positions in the flattened batch whose output is wanted; None is all.
            **kwargs: For `LlamaDecoderLayer`.

        Returns:
            `(B, T, D)`, or `(1, S, D)` with `read_positions`.
        """
        if read_positions is None:
            return super().forward(hidden_states, **kwargs)
        attended_1SD, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), read_positions=read_positions, **kwargs
        )
        hidden_1SD = rows_of(hidden_states, read_positions) + attended_1SD
        return hidden_1SD + self.mlp(self.post_attention_layernorm(hidden_1SD))


def rows_of(tensor_BTD: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
    """Take rows of a batch, `(B, T, D)`, by their positions in the flattened batch: `(1, S, D)`."""
    return tensor_BTD.flatten(0, 1).index_select(0, positions_S)[None]


def takes_chosen_queries(
    attention: LlamaAttention, hidden_BTD: torch.Tensor, attention_mask: torch.Tensor | None
) -> bool:
    """Whether the attention kernel that the model is set to can be asked for chosen positions of this batch alone."""
    is_one_row = len(hidden_BTD) == 1 and attention_mask is None
    return is_one_row and kernels.takes_chosen_queries(attention.config._attn_implementation)


def attend(
    attention: LlamaAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the attention kernel that the model is set to.

    Args:
        attention: The layer that asks.
        query: `(B, H, T, W)`, rotated; `(1, H, S, W)` with `query_positions` among the kernel's arguments.
        key: `(B, H_kv, T, W)`, rotated.
        value: `(B, H_kv, T, W)`.
        attention_mask: As the decoder made it for this kernel.
        past_key_values: Must be None: with a cache every position is read.
        **kwargs: For the kernel; `boundaries` among them.

    Returns:
        `(B, T, H, W)`, and the attention weights, where the kernel has them.
    """
    assert past_key_values is None
    name: Any = attention.config._attn_implementation
    kernel: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    dropout = attention.attention_dropout if attention.training else 0.0
    return kernel(attention, query, key, value, attention_mask, dropout=dropout, scaling=attention.scaling, **kwargs)


def read_last_layer_selectively(layers: torch.nn.ModuleList) -> None:
    """Let the last of the decoder's layers take `read_positions`; names and parameters stay."""
    last = layers[-1]
    assert isinstance(last, LlamaDecoderLayer)
    last.__class__ = LastDecoderLayer
    last.self_attn.__class__ = SelectiveAttention
