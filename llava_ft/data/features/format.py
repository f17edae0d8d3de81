"""How the features of one tile lie on disk: as they are, or in 8 bits with a scale for each token."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from llava_ft.data.features.entry_log import Array
from llava_ft.geometry import ImageGeometry

_SCALE_BYTES = 4
_LARGEST = 127


@dataclass(frozen=True, slots=True)
class FeatureFormat:
    """What is kept of a tile.

    Attributes:
        num_tokens: Tokens of a tile, N.
        width: Width of a token, C.
        dtype: What the model is given: float32, bfloat16 or float16.
        is_8bit: Whether values are kept as 8-bit integers, each token with its own scale: the largest absolute value of
            its C values becomes 127. Every value then is right to 1/254 of that largest one.
    """

    num_tokens: int
    width: int
    dtype: torch.dtype
    is_8bit: bool = False

    @classmethod
    def of_tower(
        cls, geometry: ImageGeometry, width: int, dtype: torch.dtype, kept_as: Literal["compute", "int8"]
    ) -> "FeatureFormat":
        """Return how the features of a run are kept.

        Args:
            geometry: How the model takes images.
            width: Width of the tower's features.
            dtype: The run's compute dtype.
            kept_as: Value of `vision_cache_dtype`.
        """
        return cls(geometry.tokens_per_tile, width, dtype, is_8bit=kept_as == "int8")

    @property
    def bytes_per_tile(self) -> int:
        """Bytes that a tile takes on disk."""
        values = self.num_tokens * self.width
        return values + self.num_tokens * _SCALE_BYTES if self.is_8bit else values * self.dtype.itemsize

    def encode(self, features: torch.Tensor) -> Array:
        """Return the bytes of tiles.

        Args:
            features: `(T, N, C)` finite values of any floating dtype.

        Returns:
            `(T, bytes_per_tile)` uint8.
        """
        assert features.shape[1:] == (self.num_tokens, self.width), tuple(features.shape)
        tiles = features.detach().to("cpu", self.dtype).contiguous()
        if not self.is_8bit:
            return tiles.reshape(-1).view(torch.uint8).reshape(len(tiles), self.bytes_per_tile).numpy()
        values = tiles.float()
        scale_TN1 = values.abs().amax(dim=2, keepdim=True) / _LARGEST  # noqa: N806
        steps = torch.where(scale_TN1 > 0, values / scale_TN1, 0.0).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        parts = (steps.reshape(len(tiles), -1).view(torch.uint8), scale_TN1.reshape(len(tiles), -1).view(torch.uint8))
        return torch.cat(parts, dim=1).numpy()

    def decode(self, data: Array) -> torch.Tensor:
        """Return tiles from their bytes.

        Args:
            data: `(T * bytes_per_tile,)` uint8, writable; the result may share its memory.

        Returns:
            `(T, N, C)` in `dtype`.
        """
        num_tiles, shape = len(data) // self.bytes_per_tile, (-1, self.num_tokens, self.width)
        if not self.is_8bit:
            return torch.as_tensor(data).view(self.dtype).reshape(shape)
        tiles = data.reshape(num_tiles, self.bytes_per_tile)
        cut = self.num_tokens * self.width
        steps = torch.as_tensor(tiles[:, :cut].view(np.int8)).reshape(shape)
        scales = torch.as_tensor(np.ascontiguousarray(tiles[:, cut:]).view(np.float32))
        return (steps * scales.reshape(num_tiles, self.num_tokens, 1)).to(self.dtype)
