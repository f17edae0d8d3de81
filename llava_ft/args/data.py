"""Where the records and images are, and how they are checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataArguments:
    """The training and validation records and their images."""

    data_path: str | None = field(
        default=None, metadata={"help": "Conversations: a .json list or a .jsonl file. Required to train."}
    )
    lazy_preprocess: bool = field(
        default=False,
        metadata={"help": "Accepted for old command lines; records are always prepared on demand."},
    )
    is_multimodal: bool = field(
        default=False, metadata={"help": "Accepted for old command lines; the records themselves say it."}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Directory to which the image paths of the records are relative."}
    )
    image_aspect_ratio: Literal["square", "pad"] | None = field(
        default=None,
        metadata={
            "help": "square: the CLIP processor's own resize and crop; pad: padded to a square first. "
            "Unset: checkpoint, else square."
        },
    )
    validation_data_path: str | None = field(
        default=None, metadata={"help": "Records on which the loss is evaluated during training."}
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of data_path, at least 0 and below 1, held out for evaluation; the seed decides which."
        },
    )
    on_bad_sample: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "What the checks before training do with a record that cannot be used."},
    )
    check_images: Literal["none", "exists", "header", "decode"] = field(
        default="header", metadata={"help": "How much of every image file is read before training."}
    )
    image_exif_transpose: bool = field(
        default=False, metadata={"help": "Turn images the way their EXIF orientation says."}
    )
