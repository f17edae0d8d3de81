"""Tiles that occur several times in a batch, put into it once.

Records about one picture are common in LLaVA's data, and packing puts up to a dozen records into a row. A tile that is
there once is sent to the device once, and the vision tower sees it once.
"""

from typing import Final

import torch

_VALUES_LOOKED_AT: Final = 64


def distinct_tiles(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Find equal tiles.

    Args:
        tiles: `(K, 3, H, W)` pixels.

    Returns:
        The different ones in the order of their first occurrence, `(L, 3, H, W)`, and which of them each tile is,
        `(K,)` int64. If all are different: the tiles themselves and None.
    """
    rows = tiles.flatten(1)
    probes = rows[:, :: max(1, rows.shape[1] // _VALUES_LOOKED_AT)].contiguous().numpy()
    alike: dict[bytes, list[int]] = {}
    firsts: list[int] = []
    index: list[int] = []
    for number, probe in enumerate(probes):
        candidates = alike.setdefault(probe.tobytes(), [])
        found = next((place for place in candidates if torch.equal(rows[firsts[place]], rows[number])), None)
        if found is None:
            found = len(firsts)
            firsts.append(number)
            candidates.append(found)
        index.append(found)
    if len(firsts) == len(index):
        return tiles, None
    return tiles[firsts], torch.tensor(index)
