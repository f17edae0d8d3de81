"""How one image becomes tiles and tokens: the one fact that data and models share.

A tile is a square picture that the vision tower reads; a token is one position of the language model. With `square`
and `pad` an image is one tile. With `anyres` (LLaVA-1.6) it is an overview and the tiles of a grid, and how many tokens
that gives depends on the image's size: `ImageGeometry` counts them from the size alone, with the arithmetic that the
model uses on the features.

Source: `llava/mm_utils.py` and `llava/model/llava_arch.py` of LLaVA, and LLaVA-NeXT's for `anyres_max_N`.
"""

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, cast

from llava_ft.constants import ASPECT_RATIO_PATTERN
from llava_ft.errors import UserError

SizeWH = tuple[int, int]
"""Width and height, in pixels unless said otherwise."""

MERGE_TYPES: Final = ("flat", "spatial", "spatial_unpad")
"""Known values of `mm_patch_merge_type`."""

DEFAULT_GRIDS: Final[tuple[SizeWH, ...]] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Columns and rows of tiles that LLaVA-1.6 was trained with."""

DEFAULT_S2_SCALES: Final = "336,672,1008"
"""What a checkpoint with `s2` and no `s2_scales` means."""

_REDUCTION_FROM: Final = 1.1
"""`anyres_max_N` leaves a grid alone until its sides are this many times too long, as LLaVA-NeXT does."""

_MOST_GRIDS: Final = 10_000
_LARGEST_S2_SIDE: Final = 8192
_RANGE: Final = re.compile(r"\((\d+)x(\d+)\),(?:\.\.\.|…),\((\d+)x(\d+)\)")
_GRID: Final = re.compile(r"\((\d+)x(\d+)\)")


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """How the images of a model become tiles and tokens."""

    image_size: int  # side of the square that the vision tower takes, in pixels
    tokens_per_side: int | None
    """Side of the square that the tokens of a tile form, in reading order; None if they form none."""
    tokens_per_tile: int  # positions of the language model that a tile takes: what the projector makes of its features
    features_per_tile: int  # features that the tower gives for a tile
    aspect_ratio: str = "square"  # "square", "pad", "anyres" or "anyres_max_N"
    merge_type: str = "flat"  # how the features of a grid of tiles are laid out; of no effect without anyres
    grid_pinpoints: tuple[SizeWH, ...] = ()  # with anyres: the sizes that a tiled picture may take, in pixels
    s2_scales: tuple[int, ...] = ()
    """Sides at which the tower sees each picture (S2), ascending, the tower's own first; empty without S2."""

    def __post_init__(self) -> None:
        if not ASPECT_RATIO_PATTERN.fullmatch(self.aspect_ratio):
            raise UserError(
                f"image_aspect_ratio is {self.aspect_ratio!r}; it can be 'square', 'pad', 'anyres' or 'anyres_max_N' "
                "with N from 1."
            )
        if self.merge_type not in MERGE_TYPES:
            known = ", ".join(map(repr, MERGE_TYPES))
            raise UserError(f"mm_patch_merge_type is {self.merge_type!r}; it can be {known}.")
        if self.needs_image_sizes:
            self._check_anyres()
        if self.s2_scales:
            self._check_s2()

    def _check_anyres(self) -> None:
        side = self.image_size
        wrong = [f"{w} x {h}" for w, h in self.grid_pinpoints if w < side or h < side or w % side or h % side]
        if wrong or not self.grid_pinpoints:
            raise UserError(
                f"image_grid_pinpoints holds {wrong[0] if wrong else 'nothing'}, but with {self.aspect_ratio} and a "
                f"vision tower of {side} x {side} pixels each size must be a whole number of tiles, such as "
                f"{side} x {2 * side}. Change image_grid_pinpoints, or leave it out."
            )
        if self.merge_type != "flat" and self.tokens_per_side is None:
            raise UserError(
                f"mm_patch_merge_type={self.merge_type} lays tokens out row by row, and the {self.tokens_per_tile} "
                "tokens of a tile form no square: mm_vision_select_feature=cls_patch adds a class token, or the "
                "projector does not keep their places. Use mm_vision_select_feature=patch, another projector, or "
                "mm_patch_merge_type=flat."
            )
        if self.max_tiles_of_tokens is not None and self.merge_type != "spatial_unpad":
            raise UserError(
                f"image_aspect_ratio={self.aspect_ratio} shrinks the grid of an unpadded picture, so it needs "
                f"mm_patch_merge_type=spatial_unpad, which is {self.merge_type}. Set that, or use "
                "image_aspect_ratio=anyres."
            )

    def _check_s2(self) -> None:
        scales = ",".join(map(str, self.s2_scales))
        first = self.s2_scales[0]
        if first != self.image_size or list(self.s2_scales) != sorted({s for s in self.s2_scales if s % first == 0}):
            raise UserError(
                f"s2_scales is {scales}; with a vision tower of {self.image_size} x {self.image_size} pixels it must "
                f"start with {self.image_size} and go on with larger whole multiples of it, such as "
                f"{','.join(str(n * self.image_size) for n in (1, 2, 3))}."
            )
        if self.needs_image_sizes:
            raise UserError(
                f"s2_scales={scales} and image_aspect_ratio={self.aspect_ratio} exclude each other: both cut images "
                "into tiles. Use image_aspect_ratio=pad with S2, or leave s2_scales out."
            )

    @property
    def needs_image_sizes(self) -> bool:
        """Whether the number of tokens depends on the image: with anyres."""
        return self.aspect_ratio.startswith("anyres")

    @property
    def max_tiles_of_tokens(self) -> int | None:
        """N of `anyres_max_N`: a grid has about N times the tokens of one tile at most; None without a limit."""
        match = ASPECT_RATIO_PATTERN.fullmatch(self.aspect_ratio)
        return int(match.group(1)) if match and match.group(1) else None

    @property
    def input_size(self) -> int:
        """Side in pixels of the square pictures that the model is given: a tile's, or the largest scale of S2."""
        return self.s2_scales[-1] if self.s2_scales else self.image_size

    @property
    def _side(self) -> int:
        """`tokens_per_side`, for layouts that were refused without one."""
        assert self.tokens_per_side is not None
        return self.tokens_per_side

    def num_tokens(self, size_wh: SizeWH | None = None) -> int:
        """Count the positions of the language model that an image takes.

        Args:
            size_wh: The image's width and height in pixels; needed with anyres only.
        """
        if not self.needs_image_sizes:
            return self.tokens_per_tile
        return _num_anyres_tokens(self, _needed(size_wh))

    def num_tiles(self, size_wh: SizeWH | None = None) -> int:
        """Count the tiles that an image is cut into; with anyres the overview is one of them.

        Args:
            size_wh: The image's width and height in pixels; needed with anyres only.
        """
        if not self.needs_image_sizes:
            return 1
        columns, rows = self.grid(_needed(size_wh))
        return 1 + columns * rows

    def best_resolution(self, size_wh: SizeWH) -> SizeWH:
        """Choose the size that a picture is brought to before it is cut into tiles (anyres)."""
        return select_best_resolution(size_wh, self.grid_pinpoints)

    def grid(self, size_wh: SizeWH) -> SizeWH:
        """Count the columns and rows of tiles that a picture is cut into (anyres), the overview aside."""
        width, height = self.best_resolution(size_wh)
        return width // self.image_size, height // self.image_size

    def feature_grid(self, size_wh: SizeWH) -> tuple[int, int]:
        """Count the rows and columns of tokens of a picture's grid, unpadded and reduced (`spatial_unpad`)."""
        columns, rows = self.grid(size_wh)
        padded_rows, padded_columns = rows * self._side, columns * self._side
        top, left = unpadding(padded_rows, padded_columns, size_wh)
        return self.reduced(padded_rows - 2 * top, padded_columns - 2 * left)

    def reduced(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the rows and columns that `anyres_max_N` leaves of a grid of features."""
        limit = self.max_tiles_of_tokens
        if limit is None:
            return rows, columns
        times = math.sqrt(rows * columns / (limit * self._side**2))
        if times <= _REDUCTION_FROM:
            return rows, columns
        return max(1, int(rows // times)), max(1, int(columns // times))

    @property
    def largest_size(self) -> SizeWH | None:
        """An image, by width and height in pixels, that takes the most positions; None without anyres: all take one."""
        return _largest_size(self, None) if self.needs_image_sizes else None

    def largest_size_within(self, num_positions: int) -> SizeWH | None:
        """The same of those that take at most `num_positions`; None without anyres, and if none fits."""
        return _largest_size(self, num_positions) if self.needs_image_sizes else None

    @property
    def max_tokens(self) -> int:
        """The most positions that any image takes."""
        return self.num_tokens(self.largest_size)

    @property
    def max_tiles(self) -> int:
        """The most tiles that any image is cut into."""
        if not self.needs_image_sizes:
            return 1
        return 1 + max(width * height for width, height in self.grid_pinpoints) // self.image_size**2


def select_best_resolution(size_wh: SizeWH, resolutions: Sequence[SizeWH]) -> SizeWH:
    """Choose the resolution that keeps most of a picture's pixels and, among equals, wastes fewest of its own.

    Args:
        size_wh: The picture's width and height.
        resolutions: At least one width and height.
    """
    width, height = size_wh
    best, most_kept, least_wasted = resolutions[0], 0, math.inf
    for target_width, target_height in resolutions:
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = target_width * target_height - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (target_width, target_height), kept, wasted
    return best


def fitted_size(size_wh: SizeWH, target_wh: SizeWH) -> SizeWH:
    """Return the size of a picture scaled to fit into `target_wh` with its proportions, which one side then fills."""
    (width, height), (target_width, target_height) = size_wh, target_wh
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        return target_width, min(math.ceil(height * scale_width), target_height)
    return min(math.ceil(width * scale_height), target_width), target_height


def unpadding(rows: int, columns: int, size_wh: SizeWH) -> tuple[int, int]:
    """Count the rows above (and below), and the columns left (and right), of a grid that hold padding alone.

    Args:
        rows: Rows of the grid onto which a picture was fitted.
        columns: Its columns.
        size_wh: The picture's width and height before that.
    """
    width, height = size_wh
    if width / height > columns / rows:
        return (rows - int(height * (columns / width))) // 2, 0
    return 0, (columns - int(width * (rows / height))) // 2


def parse_grid_pinpoints(value: object, image_size: int) -> tuple[SizeWH, ...]:
    """Read `image_grid_pinpoints` in any form it is written in.

    Args:
        value: Sizes in pixels, as a list or its text: `[[336, 672], [672, 336]]`; or grids of tiles, as a list
            `(1x2),(2x1)` or a range `(1x1),...,(6x6)` from the first to the last columns and rows.
        image_size: Side of a tile in pixels, for grids.

    Raises:
        UserError: It is none of these.
    """
    if isinstance(value, str):
        text = re.sub(r"\s", "", value)
        if match := _RANGE.fullmatch(text):
            first_columns, first_rows, last_columns, last_rows = map(int, match.groups())
            if (last_columns - first_columns + 1) * (last_rows - first_rows + 1) > _MOST_GRIDS:
                raise UserError(f"image_grid_pinpoints {value!r} names more than {_MOST_GRIDS:,} grids. Name fewer.")
            grids = [(c, r) for c in range(first_columns, last_columns + 1) for r in range(first_rows, last_rows + 1)]
        elif text.startswith("(") and "x" in text:
            grids = [(int(c), int(r)) for c, r in _GRID.findall(text)]
            if text != ",".join(f"({c}x{r})" for c, r in grids):
                raise _unreadable(value)
        else:
            return _read_sizes(_literal(value), value)
        return _read_sizes([(c * image_size, r * image_size) for c, r in grids], value)
    return _read_sizes(value, value)


def parse_s2_scales(value: str) -> tuple[int, ...]:
    """Read `s2_scales`: sides in pixels with commas between them; they come back in ascending order.

    Raises:
        UserError: It is something else.
    """
    parts = [part.strip() for part in value.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]*", part) for part in parts):
        raise UserError(f"s2_scales is {value!r}; it must be sides in pixels with commas, such as {DEFAULT_S2_SCALES}.")
    if max(map(int, parts)) > _LARGEST_S2_SIDE:
        raise UserError(f"s2_scales is {value!r}; sides of up to {_LARGEST_S2_SIDE:,} pixels are allowed.")
    return tuple(sorted(map(int, parts)))


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise _unreadable(text) from None


def _read_sizes(value: object, written: object) -> tuple[SizeWH, ...]:
    if not isinstance(value, list | tuple):
        raise _unreadable(written)
    sizes: list[SizeWH] = []
    for entry in cast("Sequence[object]", value):
        pair = cast("Sequence[object]", entry) if isinstance(entry, list | tuple) else ()
        if len(pair) != 2:
            raise _unreadable(written)
        width, height = pair
        if type(width) is not int or type(height) is not int or width < 1 or height < 1:
            raise _unreadable(written)
        sizes.append((width, height))
    if not sizes:
        raise _unreadable(written)
    return tuple(dict.fromkeys(sizes))


def _unreadable(value: object) -> UserError:
    return UserError(
        f"image_grid_pinpoints is {value!r}; it must be sizes of width and height in pixels, such as "
        "'[[336, 672], [672, 336]]', or grids of tiles, such as '(1x2),(2x1)' or the range '(1x1),...,(3x3)'."
    )


def _needed(size_wh: SizeWH | None) -> SizeWH:
    if size_wh is None:
        raise ValueError("With anyres the number of tiles and tokens depends on the image: its size is needed.")
    return size_wh


@lru_cache(maxsize=2**16)
def _num_anyres_tokens(geometry: ImageGeometry, size_wh: SizeWH) -> int:
    if geometry.merge_type != "spatial_unpad":
        return geometry.num_tiles(size_wh) * geometry.tokens_per_tile
    rows, columns = geometry.feature_grid(size_wh)
    return geometry.tokens_per_tile + rows * (columns + 1)


@lru_cache(maxsize=64)
def _largest_size(geometry: ImageGeometry, within: int | None) -> SizeWH | None:
    candidates = list(geometry.grid_pinpoints)
    if geometry.merge_type == "spatial_unpad":
        # A picture that is narrower than its grid has fewer features, and `anyres_max_N` may leave it more of them.
        step = geometry.image_size // geometry._side
        for width, height in geometry.grid_pinpoints:
            candidates += [(smaller, height) for smaller in (*range(width - step, 1, -step), 1)]
            candidates += [(width, smaller) for smaller in (*range(height - step, 1, -step), 1)]
    if within is not None:
        candidates = [size for size in candidates if geometry.num_tokens(size) <= within]
    return max(candidates, key=lambda size: (geometry.num_tokens(size), geometry.num_tiles(size)), default=None)
