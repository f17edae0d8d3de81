"""The attention kernels of the language model: causal attention within the samples of a batch.

| name | kernel | where |
| --- | --- | --- |
| `sdpa` | torch's `scaled_dot_product_attention` on each sample | everywhere |
| `varlen` | torch's attention for samples of different lengths, `torch.nn.attention.varlen` | GPU, bf16 and fp16 |
| `flash_attention_2`, `flash_attention_3` | those packages, through transformers' function | GPU, bf16 and fp16 |
| `flex_attention` | torch's, compiled, with a mask of blocks | GPU |
| `eager` | transformers' matrices of scores, with a mask | everywhere |

A mask over a joined row would make a kernel compute every pair of positions and throw away those of different samples;
all but `eager` are told the samples' boundaries instead. Padding on the left and caches need a mask: there all but
`eager` compute as transformers' `sdpa` does.

A sliding window (Mistral, and layers of Qwen2, Qwen3, Gemma 2) is kept by every kernel. A soft cap of the scores
(Gemma 2), sinks and biases of positions are in none of them but `eager`: they are refused and never left out.

Shapes: B rows of T positions, P = B T, S positions with a query, H heads, G heads of keys and values, W width of a
head.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from llava_ft.errors import UserError
from llava_ft.models.attention.boundaries import SampleBoundaries, find_boundaries
from llava_ft.models.precision import compute_dtype


class Request(NamedTuple):
    """What a kernel is to compute."""

    query: torch.Tensor  # (P, H, W), or (S, H, W) with `positions`
    key: torch.Tensor  # (P, G, W)
    value: torch.Tensor  # (P, G, W)
    boundaries: SampleBoundaries  # of the samples of the P positions
    scaling: float | None  # factor of the scores
    dropout: float  # probability with which a weight is dropped
    positions: torch.Tensor | None = None  # (S,) int64, ascending positions of the queries; None is all
    window: int | None = None  # a position sees so many, itself the last; None is all of its sample before it


Kernel = Callable[[Request], torch.Tensor]
"""Gives the attended values, of the shape of the queries."""


def attend_by_sample(request: Request) -> torch.Tensor:
    """Run torch's kernel on each sample in turn; it also takes queries of chosen positions alone."""
    query, key, value, boundaries, scaling, dropout, positions, window = request
    lengths, starts, counts = boundaries.lengths, boundaries.starts[:-1], boundaries.lengths
    chosen: Sequence[torch.Tensor | None] = [None] * len(lengths)
    if positions is not None:
        counts = boundaries.read_counts or boundaries.count_reads(positions).read_counts
        assert counts is not None
        chosen = positions.split(counts)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": _is_grouped(request)}
    outputs: list[torch.Tensor] = []
    for q, k, v, places, start in zip(
        _split(query, counts), _split(key, lengths), _split(value, lengths), chosen, starts, strict=True
    ):
        length = k.shape[2]
        if places is None and window is not None and length > window:
            places = torch.arange(start, start + length, device=key.device)
        mask = None if places is None else _causal(places - start, length, window)
        is_empty = q.shape[2] == 0  # no position of this sample is chosen
        outputs.append(
            q if is_empty else F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **options)
        )
    return torch.cat([output[0].transpose(0, 1) for output in outputs])


def attend_varlen(request: Request) -> torch.Tensor:
    """Run torch's attention for samples of different lengths."""
    from torch.nn.attention import varlen

    ends, longest = request.boundaries.cu_seqlens, request.boundaries.max_length
    attended = varlen.varlen_attn(
        *(request.query, request.key, request.value, ends, ends, longest, longest),
        scale=request.scaling,
        window_size=(-1 if request.window is None else request.window - 1, 0),
        enable_gqa=_is_grouped(request),
    )
    assert isinstance(attended, torch.Tensor)
    return attended


def attend_flex(request: Request) -> torch.Tensor:
    """Run torch's flexible attention, compiled on a GPU."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (request.query, request.key, request.value))
    block_mask = request.boundaries.block_mask(request.window)
    attended = _flex_attention(query.is_cuda)(
        query, key, value, block_mask=block_mask, scale=request.scaling, enable_gqa=_is_grouped(request)
    )
    return attended[0].transpose(0, 1)


def attend_flash(name: str, request: Request) -> torch.Tensor:
    """Run an installed FlashAttention package.

    transformers is given where samples begin, so that it neither looks for it in `position_ids` nor, since the choice
    of a kernel asks for the package, for the package on a hub.

    Args:
        name: `flash_attention_2` or `flash_attention_3`.
        request: What to compute.
    """
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    boundaries = request.boundaries
    attended = _flash_attention_forward(
        request.query[None],
        request.key[None],
        request.value[None],
        None,
        query_length=len(request.query),
        is_causal=True,
        dropout=request.dropout,
        softmax_scale=request.scaling,
        sliding_window=request.window,
        cu_seq_lens_q=boundaries.cu_seqlens,  # pyright: ignore[reportArgumentType] - int32, as the packages want it
        cu_seq_lens_k=boundaries.cu_seqlens,  # pyright: ignore[reportArgumentType]
        max_length_q=boundaries.max_length,
        max_length_k=boundaries.max_length,
        attn_implementation=name,
    )
    return attended[0]


_KERNELS: Final[Mapping[str, Kernel]] = {
    "sdpa": attend_by_sample,
    "varlen": attend_varlen,
    "flex_attention": attend_flex,
    "flash_attention_2": partial(attend_flash, "flash_attention_2"),
    "flash_attention_3": partial(attend_flash, "flash_attention_3"),
}

_REGISTERED: Final[Mapping[str, str]] = {
    "sdpa": "by_sample",
    "varlen": "by_sample_varlen",
    "flex_attention": "by_sample_flex",
    "flash_attention_2": "by_sample_fa2",
    "flash_attention_3": "by_sample_fa3",
}
"""What transformers knows the kernels as: a name with "flash" in it would make it look for kernels on a hub."""

_WIDEST: Final[Mapping[str, int]] = {"flash_attention_3": 256, "flash_attention_2": 256, "varlen": 256}
"""Widths of a head up to which the kernels of GPUs are made."""

_WITHOUT_DROPOUT: Final = ("flash_attention_3", "varlen", "flex_attention")

_LEAST_FLEX_WIDTH: Final = 16

_NOT_DONE: Final = ("softcap", "s_aux", "sinks", "position_bias", "alibi", "indices", "block_indices")
"""What layers of some models hand to their kernel, and none here computes."""


def register(name: str) -> str:
    """Make a kernel known to transformers.

    Args:
        name: A key of the table in this module's text.

    Returns:
        The value of a configuration's `_attn_implementation` that means this kernel.

    Raises:
        UserError: There is no such kernel, or its package is not installed, for which transformers would ask a hub.
    """
    if name == "eager":
        return name
    if name not in _KERNELS:
        raise UserError(f"attn_implementation is {name!r}. Allowed: {', '.join([*_KERNELS, 'eager'])}.")
    is_there = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if name in is_there and not is_there[name]():
        raise UserError(f"attn_implementation is {name}, whose package is not installed. Install it, or use sdpa.")
    registered = _REGISTERED[name]
    AttentionInterface.register(registered, partial(_attend, name))
    AttentionMaskInterface.register(registered, _mask)
    return registered


def fitting_kernel(kernel: str, config: Any, *, is_named: bool = False) -> str:
    """Return a kernel that goes with a model: the one given, else the first of `sdpa` and `eager` that does.

    Args:
        kernel: What is to be used.
        config: The language model's configuration.
        is_named: Whether the user named it, so that no other may take its place.

    Raises:
        UserError: It was named and does not go with the model.
    """
    fitting = [name for name in (kernel, "sdpa", "eager") if limit(name, config) is None]
    if is_named and kernel not in fitting:
        raise UserError(
            f"attn_implementation={kernel} does not go with this model: {limit(kernel, config)}. Allowed here: "
            f"{', '.join(fitting)}. Use auto, which takes {fitting[0]} here."
        )
    return fitting[0]


def limit(kernel: str, config: Any) -> str | None:
    """Say why a kernel does not go with a model, by its language model's configuration; None if it does."""
    if kernel != "eager" and getattr(config, "attn_logit_softcapping", None):
        return f"it has attn_logit_softcapping {config.attn_logit_softcapping}, and the kernel has no soft cap"
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if width > _WIDEST.get(kernel, width):
        return f"its heads are {width} wide, and the kernel's at most {_WIDEST[kernel]}"
    if kernel == "varlen" and width % 8:
        return f"its heads are {width} wide, and the kernel's a multiple of 8"
    if kernel == "flex_attention" and width < _LEAST_FLEX_WIDTH:
        return f"its heads are {width} wide, and the kernel's at least {_LEAST_FLEX_WIDTH}"
    if kernel in _WITHOUT_DROPOUT and config.attention_dropout:
        return f"it has attention_dropout {config.attention_dropout}, and the kernel has none"
    return None


def takes_boundaries(registered: str | None) -> bool:
    """Whether a model set to a kernel of that name tells samples apart by their boundaries; else it uses a mask."""
    return registered in _REGISTERED.values()


def takes_chosen_queries(registered: str | None) -> bool:
    """Whether a kernel of that name can be asked for chosen positions alone."""
    return registered == _REGISTERED["sdpa"]


def _attend(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | int | None,
    *,
    boundaries: SampleBoundaries | None = None,
    position_ids: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within samples, as transformers calls a kernel.

    Args:
        name: The kernel.
        module: The layer that asks.
        query: `(B, H, T, W)`; `(1, H, S, W)` with `query_positions`.
        key: `(B, G, T, W)`.
        value: `(B, G, T, W)`.
        attention_mask: As `_mask` made it for this layer: a mask, the number of positions of a sliding window, or None.
        boundaries: The samples. Without them, which means that the decoder runs without the model around it, they are
            found in `position_ids`.
        position_ids: `(B, T)` int64.
        query_positions: `(S,)` int64 ascending positions of the flattened batch; None is all.
        dropout: Probability with which a weight is dropped.
        scaling: Factor of the scores.
        sliding_window: How many positions each sees, itself the last; None is all before it, or as the mask says.
        **kwargs: For transformers' `sdpa`.

    Returns:
        `(B, T, H, W)`, or `(1, S, H, W)` with `query_positions`; and no weights.

    Raises:
        ValueError: The layer asks for something that the kernel would leave out.
    """
    left_out = [f"has {key}" for key in _NOT_DONE if kwargs.get(key) is not None]
    left_out += ["has dropout"] * bool(dropout and name in _WITHOUT_DROPOUT)
    left_out += ["looks ahead"] * (False in (kwargs.get("is_causal"), getattr(module, "is_causal", True)))
    if left_out:
        raise ValueError(
            f"This model's attention {left_out[0]}, which the kernel {name} does not compute. Use "
            f"--attn_implementation {'sdpa' if left_out == ['has dropout'] else 'eager'}."
        )
    if isinstance(attention_mask, int):
        attention_mask, sliding_window = None, attention_mask
    assert query_positions is None or name == "sdpa"
    is_masked = attention_mask is not None or (query_positions is None and query.shape[2] != key.shape[2])
    if not is_masked and boundaries is None:
        boundaries = find_boundaries(key.shape[0], key.shape[2], key.device, position_ids=position_ids)
    is_unbroken = query_positions is None and boundaries is not None and boundaries.are_rows
    is_plain = name == "sdpa" and is_unbroken and (sliding_window is None or sliding_window >= key.shape[2])
    if is_masked or is_plain or boundaries is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    kernel, tensors = _KERNELS[name], (query, key, value)
    return _run(kernel, tensors, boundaries, scaling, dropout, query_positions, sliding_window), None


@torch.compiler.disable()
def _run(
    kernel: Kernel,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    boundaries: SampleBoundaries,
    scaling: float | None,
    dropout: float,
    positions: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """Run a kernel on the flattened batch; torch.compile leaves it out, since lengths differ from batch to batch."""
    if window is not None and window >= boundaries.max_length:  # asked here: a graph would depend on the samples
        window = None
    dtype = compute_dtype(tensors[2])
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in tensors)
    attended = kernel(Request(query, key, value, boundaries, scaling, dropout, positions, window))
    return attended.unflatten(0, (len(tensors[0]), -1))


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | int | None:
    """Say what the positions see of their samples, as transformers asks for a mask.

    Returns:
        None where they see all before them, and a sliding window as its number of positions: `_attend` needs no more
        beside the boundaries. Not every layer hands its window to the kernel (those of Qwen2-MoE and Phi-MoE leave it
        to the mask), so it is told here. transformers' mask where there is padding or a cache, or a pattern of another
        kind, such as Llama 4's chunks.
    """
    is_known = not use_vmap and local_size in (None, getattr(config, "sliding_window", None))
    if attention_mask is None and q_length == kv_length and is_known:
        return None if local_size is None or local_size >= kv_length else local_size
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        config=config,
        **kwargs,
    )


@cache
def _flex_attention(is_compiled: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if is_compiled else flex_attention


def _split(tensor_PHW: torch.Tensor, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """Cut into samples, each `(1, H, T, W)`."""
    return [part.transpose(0, 1)[None] for part in tensor_PHW.split(lengths)]


def _causal(positions_S: torch.Tensor, num_keys: int, window: int | None) -> torch.Tensor:
    """Which keys each query sees: `(S, T)` bool."""
    behind_ST = positions_S[:, None] - torch.arange(num_keys, device=positions_S.device)
    return (behind_ST >= 0) if window is None else (behind_ST >= 0) & (behind_ST < window)


def _is_grouped(request: Request) -> bool:
    return request.query.shape[1] != request.key.shape[1]
