"""Where the records and images are, and how they are checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_ft.args.value_types import flag


@dataclass
class DataArguments:
    """The training and validation records and their images."""

    data_path: str | None = flag(
        None,
        "Conversations: a .json list, a .jsonl file, parquet, Arrow, tar shards, a dataset's directory or name, or a "
        ".yaml mixture of these. Required to train.",
    )
    lazy_preprocess: bool = flag(False, "Accepted for old command lines; records are always prepared on demand.")
    is_multimodal: bool = flag(False, "Accepted for old command lines; the records themselves say it.")
    image_folder: str | None = flag(None, "Directory to which the image paths of the records are relative.")
    image_aspect_ratio: str | None = flag(
        None,
        "square: the CLIP processor's own resize and crop; pad: padded to a square first; anyres: an overview and "
        "tiles of a grid from image_grid_pinpoints; anyres_max_N: the same with at most N x the tokens of one tile. "
        "Unset: checkpoint, else square.",
    )
    image_grid_pinpoints: str | None = flag(
        None,
        "With anyres: the sizes a tiled image may take, as '[[336, 672], [672, 336]]' (width, height) or as a range of "
        "grids '(1x1),...,(3x3)'. Unset: checkpoint, else the five of LLaVA-1.6.",
    )
    validation_data_path: str | None = flag(None, "Records on which the loss is evaluated during training.")
    validation_fraction: float = flag(
        0.0, "Share of data_path, at least 0 and below 1, held out for evaluation; the seed decides which."
    )
    on_bad_sample: Literal["error", "skip"] = flag(
        "error", "What the checks before training do with a record that cannot be used."
    )
    check_images: Literal["none", "exists", "header", "decode"] = flag(
        "header", "How much of every image file is read before training."
    )
    image_exif_transpose: bool = flag(False, "Turn images the way their EXIF orientation says.")
    image_fast_decode: bool = flag(
        False,
        "Let the JPEG decoder shrink large photographs while decoding: several times faster, with slightly other "
        "pixels.",
    )
    truncation: Literal["error", "drop", "truncate"] = flag(
        "truncate",
        "What is done with a sample longer than model_max_length. error: the run is refused; drop: it is left out; "
        "truncate: its last turns are left out, and an image never loses a part.",
    )
    supervise: Literal["answers", "last_answer", "all"] = flag(
        "answers",
        "Text that is learnt. answers: what the assistant says; last_answer: only its last turn; all: the prompt too.",
    )
    packing: bool = flag(
        False,
        "Put several samples into one row of model_max_length tokens; attention and positions stay separate, and the "
        "batch size counts rows.",
    )
    padding_free: bool = flag(
        False, "Join the samples of a batch into one row instead of padding them to the longest one."
    )
    length_multiple: int | None = flag(
        None,
        "Fill rows of a batch up to a multiple of this many tokens, so that few lengths occur; 0 does not. Unset: 128 "
        "with torch_compile, else 0.",
    )
    vision_cache: str | None = flag(
        None, "Directory that keeps the features of the frozen vision tower, computed once per image."
    )
    vision_cache_dtype: Literal["compute", "int8"] = flag(
        "compute", "With vision_cache: the compute dtype of the run, or 8-bit, half the size and not exact."
    )
    data_cache_dir: str | None = flag(
        None, "Where prepared records are kept. Unset: beside the caches of Hugging Face datasets."
    )
    preprocessing_num_workers: int | None = flag(None, "Processes that prepare the records. Unset: one for each core.")
