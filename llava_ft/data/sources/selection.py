"""Which records of each source of a mixture are trained on, and which are held out.

The choice is arithmetic on numbers of records: the same on every rank, for the same seed. What is chosen from a source
depends on the source itself, the seed and its place among entries of the same path, not on the other sources, so that
what is held out stays held out when a mixture grows.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from llava_ft.data.sources.base import Array, Selection
from llava_ft.data.sources.mixture import Mixture, MixtureEntry
from llava_ft.errors import UserError


def select_rows(num_records: Sequence[int], mixture: Mixture, seed: int) -> Selection:
    """Choose among the usable records of each source; the seed decides which are held out, and which of many are taken.

    Raises:
        UserError: A source has too few usable records for what is asked.
    """
    entries = mixture.entries
    held_out: list[Array] = []
    pools: list[Array] = []
    streams = _streams(entries, seed)
    for entry, stream, number in zip(entries, streams, num_records, strict=True):
        order = stream.permutation(number)
        cut = _num_held_out(entry, number)
        held_out.append(np.sort(order[:cut]))
        pools.append(np.sort(order[cut:]))
    train: list[Array] = []
    for pool, count, stream in zip(pools, _counts(mixture, [len(pool) for pool in pools]), streams, strict=True):
        # Whole passes over the pool, and a random choice of it for the rest.
        passes, rest = divmod(count, len(pool))
        times = np.full(len(pool), passes, dtype=np.int64)
        times[stream.permutation(len(pool))[:rest]] += 1
        train.append(np.repeat(pool, times))
    return Selection(train, held_out)


def _streams(entries: Sequence[MixtureEntry], seed: int) -> list[np.random.Generator]:
    streams: list[np.random.Generator] = []
    seen: dict[tuple[str, str | None], int] = {}
    for entry in entries:
        place = (entry.path, entry.split)
        seen[place] = seen.get(place, 0) + 1
        text = f"{seed}\0{entry.path}\0{entry.split or ''}\0{seen[place]}"
        digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        streams.append(np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little"))))
    return streams


def _num_held_out(entry: MixtureEntry, number: int) -> int:
    if not number:
        raise UserError(f"Source {entry.name} of the mixture has no usable record. Fix its records or leave it out.")
    if entry.held_out is None:
        return 0
    wanted = entry.held_out if isinstance(entry.held_out, int) else max(1, round(number * entry.held_out))
    if wanted >= number:
        raise UserError(
            f"Source {entry.name} of the mixture has {number} usable record(s), and held_out = {entry.held_out} leaves "
            "none to train on. Hold out fewer, or name the source with --validation_data_path instead."
        )
    return wanted


def _counts(mixture: Mixture, sizes: Sequence[int]) -> list[int]:
    """Decide how many records of each source an epoch has."""
    entries = mixture.entries
    if entries[0].weight is None:
        return [
            entry.count if entry.count is not None else entry.repeat * size
            for entry, size in zip(entries, sizes, strict=True)
        ]
    weights = [Fraction(entry.weight or 0) for entry in entries]
    epoch_size = mixture.epoch_size or sum(sizes)
    quotas = [epoch_size * weight / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    # The largest remainders get what rounding down left over; of equal ones the first.
    by_remainder = sorted(range(len(quotas)), key=lambda place: counts[place] - quotas[place])
    for place in by_remainder[: epoch_size - sum(counts)]:
        counts[place] += 1
    return counts
