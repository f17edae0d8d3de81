"""Numbers about the usable records: how long they are, what truncation takes away, what packing will give.

They are JSON values, as they stand in the report; `docs/how-to/check-data.md` says what each means.
"""

import math
from typing import Any, Final

import numpy as np

from llava_ft.data.packing import pack
from llava_ft.data.preparation.tokenized_rows import Array
from llava_ft.data.preparation.truncation import Limits
from llava_ft.inspection.check_source import SourceCheck

_MOST_BINS: Final = 16
_NICE_STEPS: Final = (1, 2, 4, 5, 8, 10)
_SHARE_IN_BINS: Final = 0.995  # of the records, at least, in the bins of equal width; the rest share the last bin


def count_all(check: SourceCheck, limits: Limits) -> dict[str, Any]:
    """Count what was found in a source under the limits of a run."""
    columns, decoded = check.columns, check.images.decoded
    tokens, supervised = int(columns["kept_tokens"].sum()), int(columns["kept_supervised"].sum())

    def lost(name: str) -> int:
        return int((columns[name] - columns[f"kept_{name}"]).sum())

    lengths = None
    if len(ordered := np.sort(columns["tokens"])):
        lengths = {
            "shortest": int(ordered[0]),
            "median": int(ordered[(len(ordered) - 1) // 2]),
            "mean": round(float(ordered.mean()), 1),
            "p99": int(ordered[math.ceil(0.99 * len(ordered)) - 1]),
            "longest": int(ordered[-1]),
            "histogram": make_histogram(ordered),
        }
    return {
        "records": len(check.source),
        "usable": len(columns["index"]),
        "images": len(check.images.numbers),
        "image_files": len(decoded),
        "image_bytes": sum(image.num_bytes for image in decoded),
        "unusable_images": sum(image.error is not None for image in decoded),
        "tokens": tokens,
        "supervised": supervised,
        "lengths": lengths,
        "truncation": {
            "max_length": limits.max_length,
            "policy": limits.truncation,
            "records_cut": int((columns["kept_tokens"] < columns["tokens"]).sum()),
            "records_dropped": len(check.dropped.indices),
            "tokens_lost": lost("tokens"),
            "supervised_lost": lost("supervised"),
            "answers_lost": lost("answers"),  # those that are not whole any more
            "images_lost": lost("images"),
        },
        "supervised_share": round(supervised / max(1, tokens), 6),
    }


def make_histogram(ordered: Array) -> dict[str, list[int]]:
    """Count lengths, which ascend, in bins of one round width; the last bin takes everything beyond.

    Returns:
        `edges`, where each bin starts, and their `counts`.
    """
    most = int(ordered[math.ceil(_SHARE_IN_BINS * len(ordered)) - 1])
    first = int(ordered[0])
    step = (most + 1 - first) / _MOST_BINS
    power = 10 ** max(0, math.floor(math.log10(max(step, 1))))
    width = next(power * nice for nice in _NICE_STEPS if power * nice >= step)
    edges = list(range(first // width * width, most + 1, width))
    counts = np.histogram(ordered, bins=[*edges, max(edges[-1] + width, int(ordered[-1]) + 1)])[0]
    return {"edges": edges, "counts": counts.tolist()}


def count_epoch(lengths: Array, supervised: Array, *, max_length: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Say what an epoch of the training data is made of, given the tokens of its records after truncation.

    Efficiency is the share of computed positions that hold a token: with `--packing true`, and without it, records in
    random order padded to the longest of their batch. `batch_size` is that of one rank. There is at least one record.
    """
    rows = len(pack(lengths, max_length, seed))
    shuffled = np.random.default_rng(seed).permutation(lengths)
    starts = np.arange(0, len(shuffled), batch_size)
    sizes = np.minimum(batch_size, len(shuffled) - starts)
    padded = int((np.maximum.reduceat(shuffled, starts) * sizes).sum())
    total = int(lengths.sum())
    return {
        "records": len(lengths),
        "tokens": total,
        "supervised": int(supervised.sum()),
        "packing": {
            "rows": rows,
            "max_length": max_length,
            "records_per_row": round(len(lengths) / rows, 2),
            "efficiency": round(total / (rows * max_length), 4),
            "padded_efficiency": round(total / padded, 4),
            "batch_size": batch_size,
        },
    }
