"""The settings of a tower's image processor: preprocessor_config.json in each form that was ever written.

A model in transformers' own layout describes its own image processor, which is the tower's with a step before it:
padding to a square, or cutting into tiles. transformers 5 keeps that inside `processor_config.json`, which then wins.

Rescaling and normalisation give each of the 256 levels of a channel one value, so both are a table (`PixelNormalizer`):
pictures travel as bytes, a quarter of the size, and become numbers on the device.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from PIL import Image

from llava_ft.errors import UserError
from llava_ft.json_files import read_json

PREPROCESSOR_CONFIG: Final = "preprocessor_config.json"
PROCESSOR_CONFIG: Final = "processor_config.json"


@dataclass(frozen=True, slots=True)
class ImageProcessorSettings:
    """How pictures are resized, cropped, rescaled and normalised; the names are those of preprocessor_config.json.

    Sizes are in pixels. `size` is `{"shortest_edge": N}`, which keeps proportions, or `{"height": H, "width": W}`.
    """

    size: dict[str, int] = field(default_factory=lambda: {"shortest_edge": 224})
    crop_size: dict[str, int] = field(default_factory=lambda: {"height": 224, "width": 224})
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    resample: int = 3  # Pillow's number of the filter: bicubic
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = PREPROCESSOR_CONFIG) -> "ImageProcessorSettings":
        """Read the content of a preprocessor_config.json from `source`; a missing key has the processor's default.

        Sizes are a number or a mapping, as the versions of transformers wrote them.

        Raises:
            UserError: It describes another kind of processor, or a value is not usable.
        """
        processor = values.get("image_processor_type") or values.get("feature_extractor_type") or "CLIP"
        defaults = next(
            (settings for known, settings in _PROCESSORS.items() if re.fullmatch(known, str(processor))), None
        )
        if defaults is None:
            raise UserError(f"{source} describes a {processor}; only CLIP's are known. Use a CLIP vision tower.")
        given = {name: value for name, value in values.items() if value is not None}

        def read(name: str, is_allowed: Callable[[Any], bool], allowed: str) -> Any:
            value = given.get(name, getattr(defaults, name))
            if not is_allowed(value):
                raise UserError(f"{source}: {name} is {value!r}; it must be {allowed}.")
            return value

        def read_size(name: str, number_means: Sequence[str], *known: set[str]) -> dict[str, int]:
            shapes = " or ".join(f"a mapping with {' and '.join(sorted(keys))}" for keys in known)
            value = read(name, lambda value: _is_size(value, known), f"a number of pixels or {shapes}")
            if isinstance(value, dict):
                return dict(cast("dict[str, int]", value))
            return dict.fromkeys(number_means, cast("int", value))

        def switch(name: str) -> bool:
            return read(name, lambda value: isinstance(value, bool), "true or false")

        def is_filter(value: Any) -> bool:
            return value in [int(known) for known in Image.Resampling] and not isinstance(value, bool)

        def are_channels(value: Any) -> bool:
            numbers = list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else []
            return len(numbers) == 3 and all(map(_is_finite, numbers))

        def channels(name: str) -> tuple[float, float, float]:
            red, green, blue = read(name, are_channels, "a list of three numbers: red, green, blue")
            return float(red), float(green), float(blue)

        settings = cls(
            size=read_size("size", ["shortest_edge"], {"shortest_edge"}, {"height", "width"}),
            crop_size=read_size("crop_size", ["height", "width"], {"height", "width"}),
            do_resize=switch("do_resize"),
            do_center_crop=switch("do_center_crop"),
            do_rescale=switch("do_rescale"),
            do_normalize=switch("do_normalize"),
            resample=int(read("resample", is_filter, "the number of a Pillow filter, 0 to 5")),
            rescale_factor=float(read("rescale_factor", _is_finite, "a number")),
            image_mean=channels("image_mean"),
            image_std=channels("image_std"),
        )
        if 0.0 in settings.image_std:
            raise UserError(f"{source}: image_std is {list(settings.image_std)}; no channel can have 0.")
        return settings

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "ImageProcessorSettings":
        """Read how a vision tower, or a model in transformers' own layout, prepares images.

        `path` is a directory, the file itself, or the name of a model on the Hugging Face hub.

        Raises:
            UserError: There is no such file, or it is not usable.
        """
        file = _find_preprocessor_config(path)
        return cls.from_dict(_described_in(file), str(file))

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of every prepared picture, in pixels.

        Raises:
            UserError: Pictures would come out in different sizes.
        """
        if self.do_center_crop:
            return self.crop_size["height"], self.crop_size["width"]
        if self.do_resize and "height" in self.size:
            return self.size["height"], self.size["width"]
        raise UserError(
            f"An image processor with do_center_crop false, do_resize {str(self.do_resize).lower()} and size "
            f"{self.size} gives pictures of different sizes; the vision tower needs one. Set do_center_crop "
            "to true, or size to a height and a width."
        )

    def resized_to(self, side: int) -> "ImageProcessorSettings":
        """Give the same settings for pictures of `side` x `side` pixels."""
        square = {"height": side, "width": side}
        return replace(self, size={"shortest_edge": side} if "shortest_edge" in self.size else square, crop_size=square)

    def to_dict(self) -> dict[str, Any]:
        """Give the content of a preprocessor_config.json that transformers and LLaVA read back."""
        values = asdict(self)
        values["image_mean"], values["image_std"] = list(self.image_mean), list(self.image_std)
        return {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, **values}


class PixelNormalizer:
    """Turns the bytes of prepared pictures into what the vision tower reads, on whatever device they are.

    The values are those of transformers' processors, bit for bit: rescaled in float64, rounded to float32, and
    normalised in float32.
    """

    def __init__(self, settings: ImageProcessorSettings):
        levels = np.arange(256, dtype=np.float64)
        values = (levels * settings.rescale_factor if settings.do_rescale else levels).astype(np.float32)
        table = np.tile(values, (3, 1))
        if settings.do_normalize:
            mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (settings.image_mean, settings.image_std))
            table = (table - mean) / std
        self._table = torch.as_tensor(table)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise `(..., 3, H, W)` uint8 (red, green, blue) to float32 of the same shape on the same device."""
        table = self._table.to(pixels.device)
        channels = [
            table[channel].index_select(0, pixels.select(-3, channel).reshape(-1).int()) for channel in range(3)
        ]
        shape = (*pixels.shape[:-3], *pixels.shape[-2:])
        return torch.stack([values.reshape(shape) for values in channels], dim=-3)


def normalize_batch(batch: dict[str, Any], normalizer: PixelNormalizer | None) -> dict[str, Any]:
    """Normalise the bytes in a batch's `pixel_values`, if it has any."""
    pixels = batch.get("pixel_values")
    if normalizer is None or pixels is None or pixels.dtype != torch.uint8:
        return batch
    return {**batch, "pixel_values": normalizer(pixels)}


_PROCESSORS: Final = {r"CLIP.*|Llava(?:Next)?ImageProcessor(?:Fast|Pil)?": ImageProcessorSettings()}
"""The image processors that are known by what files call them, and what a value means that their files leave out."""


def _is_size(value: Any, known: Sequence[set[str]]) -> bool:
    if isinstance(value, dict):
        sides = cast("dict[str, Any]", value)
        return set(sides) in known and all(_is_size(side, ()) for side in sides.values())
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def image_settings_file(directory: Path) -> Path | None:
    """Find the file that says how a directory's model prepares images; None without one."""
    inside, alone = directory / PROCESSOR_CONFIG, directory / PREPROCESSOR_CONFIG
    if inside.is_file() and "image_processor" in read_json(inside):
        return inside
    return alone if alone.is_file() else None


def pads_to_square(directory: Path) -> bool:
    """Whether a model in transformers' own layout pads images to a square before anything else, as LLaVA's `pad`."""
    file = image_settings_file(directory)
    values = _described_in(file) if file is not None else {}
    kind = str(values.get("image_processor_type"))
    return bool(values.get("do_pad")) and kind.startswith("LlavaImageProcessor")


def copy_image_settings(source: Path, target: Path) -> None:
    """Write preprocessor_config.json for a model whose images are prepared as those of another directory.

    A file that describes the tower's own processor is copied as it is.
    """
    settings = ImageProcessorSettings.from_pretrained(source)
    file = _find_preprocessor_config(source)
    if file.name == PREPROCESSOR_CONFIG and "Llava" not in str(_described_in(file).get("image_processor_type")):
        shutil.copyfile(file, target / PREPROCESSOR_CONFIG)
        return
    (target / PREPROCESSOR_CONFIG).write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")


def _described_in(file: Path) -> dict[str, Any]:
    """Return the image processor that a file describes: its whole content, or the part of it that does."""
    values = read_json(file)
    inside = values.get("image_processor") if file.name == PROCESSOR_CONFIG else None
    return cast("dict[str, Any]", inside) if isinstance(inside, dict) else values


def _find_preprocessor_config(path: str | os.PathLike[str]) -> Path:
    local = Path(path)
    if local.is_dir():
        file = image_settings_file(local)
        if file is None:
            raise UserError(
                f"{os.fspath(path)} holds no {PREPROCESSOR_CONFIG}, which says how images are prepared. "
                "Copy it from the vision tower that the model was trained with."
            )
        return file
    if local.is_file():
        return local
    import transformers.utils.hub as hub  # a second of importing, needed for names on the hub only

    try:
        found = hub.cached_file(os.fspath(path), PREPROCESSOR_CONFIG)  # pyright: ignore[reportUnknownMemberType]
    except (OSError, ValueError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{os.fspath(path)!r} is neither a local directory with a {PREPROCESSOR_CONFIG} nor a model that "
            f"can be reached on the Hugging Face hub: {first_line}"
        ) from None
    if found is None:
        raise UserError(f"{os.fspath(path)!r} on the Hugging Face hub has no {PREPROCESSOR_CONFIG}.")
    return Path(found)
