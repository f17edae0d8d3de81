"""The data set of a run: records that were checked, tokenised and measured before the first step.

Lengths are exact before any image is decoded. Images are decoded when an item is asked for; one that has
become unreadable by then never stops the run: its sample keeps its length and loses its labels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.image_files import IMAGE_CHECKS, ImageCheck, find_bad_images, resolve_image_path
from llava_ft.data.image_reader import ImagePlace, ImageReader, ImageRef, ReadsImages
from llava_ft.data.images import ImageError, ImageTransform
from llava_ft.data.prepared import Array, PreparedSamples, prepare_samples
from llava_ft.data.report import BadSamplePolicy, DataReport, apply_policy
from llava_ft.data.schema import Sample, load_records, parse_record
from llava_ft.data.tokenize import TokenizedSample
from llava_ft.errors import BadSampleError, UserError


class ConversationDataset(Dataset[dict[str, Any]]):
    """Conversations about images as tensors.

    Args:
        prepared: The samples.
        image_reader: Gives the entries of an item that stand for its images, usually an `ImageReader`; None when no
            sample has images.
        rows: Which of the samples belong to this data set, in order; None means all.
    """

    def __init__(
        self,
        prepared: PreparedSamples,
        *,
        image_reader: ReadsImages | None = None,
        rows: Sequence[int] | Array | None = None,
    ):
        self.prepared = prepared
        self.image_reader = image_reader
        self.rows: Array = np.arange(len(prepared)) if rows is None else np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample after expansion and truncation."""
        return self.prepared.lengths[self.rows].tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """Tokens of each sample, negative for a sample without images."""
        lengths, num_images = self.prepared.lengths[self.rows], self.prepared.num_images[self.rows]
        return np.where(num_images > 0, lengths, -lengths).tolist()

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Give one sample.

        Returns:
            `input_ids` `(T,)` int64, expanded: each image position holds `IMAGE_TOKEN_INDEX`; `labels`
            `(T,)` int64; `pixel_values` `(M, 3, H, W)` float32, absent without images; `index`, the position
            of the record in its file. If an image cannot be read, `labels` are all `IGNORE_INDEX`,
            `pixel_values` zeros, and `bad_sample` is the `BadSampleError` that says why.
        """
        row = int(self.rows[position])
        expanded = self.prepared.expanded(row)
        item: dict[str, Any] = {
            "input_ids": torch.tensor(expanded.input_ids, dtype=torch.int64),
            "labels": torch.tensor(expanded.labels, dtype=torch.int64),
            "index": int(self.prepared.record_indices[row]),
        }
        if expanded.num_images_kept == 0:
            return item
        assert self.image_reader is not None, "a sample with images needs an image reader"
        images = self.image_refs(position)
        try:
            item.update(self.image_reader.read(images))
        except ImageError as error:
            item["labels"].fill_(IGNORE_INDEX)
            item.update(self.image_reader.blank(images))
            item["bad_sample"] = self.prepared.bad_sample(row, error.kind, str(error))
        return item

    def image_refs(self, position: int) -> list[ImageRef]:
        """Name the images of one sample that truncation leaves, in reading order."""
        row = int(self.rows[position])
        return [ImageRef(image) for image in self.prepared.images(row)[: int(self.prepared.num_images[row])]]

    def subset(self, positions: Sequence[int] | Array) -> "ConversationDataset":
        """Give a data set of some of the samples, sharing everything with this one."""
        return ConversationDataset(
            self.prepared,
            image_reader=self.image_reader,
            rows=self.rows[np.asarray(positions, dtype=np.int64)],
        )

    def describe(self, record_index: int) -> str:
        """Name a record for messages: its position in the file, and its id if it has one."""
        row = int(np.searchsorted(self.prepared.record_indices, record_index))
        sample_id = self.prepared.sample_ids[row] if row < len(self.prepared) else ""
        return f"{record_index} (id {sample_id!r})" if sample_id else str(record_index)


@dataclass(frozen=True)
class BuiltDatasets:
    """What a run trains and evaluates on.

    Attributes:
        train: The training data.
        validation: The validation data, or None.
        report: What was found in the training file, held-out records included.
        validation_report: What was found in the validation file; None without one.
    """

    train: ConversationDataset
    validation: ConversationDataset | None
    report: DataReport
    validation_report: DataReport | None = None


def build_datasets(
    data_path: str | PathLike[str],
    *,
    tokenize: Callable[[Sample], TokenizedSample],
    image_transform: ImageTransform | None,
    image_folder: str | PathLike[str] | None,
    tokens_per_image: int,
    model_max_length: int,
    on_bad_sample: BadSamplePolicy = "error",
    check_images: ImageCheck = "header",
    exif_transpose: bool = False,
    validation_path: str | PathLike[str] | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> BuiltDatasets:
    """Load, check, tokenise and split the records of a run.

    Args:
        data_path: Training records, `.json` or `.jsonl`.
        tokenize: Usually a `SampleTokenizer`.
        image_transform: Prepares one picture; None for a model without vision tower.
        image_folder: Folder that relative paths of images start from.
        tokens_per_image: Positions that one image takes.
        model_max_length: Tokens after which a sample is cut off.
        on_bad_sample: "error" raises if any record cannot be used; "skip" leaves it out, counts and logs it.
        check_images: How much of each image file is read: "none", "exists", "header" or "decode".
        exif_transpose: Whether pictures are turned as their EXIF orientation says.
        validation_path: Validation records of their own.
        validation_fraction: Share of the usable training records that is held out for validation instead; at
            least one record.
        seed: Decides which records are held out.

    Raises:
        UserError: A file cannot be read, no usable record is left, records have images but there is no vision
            tower or no image folder, or (with "error") a record cannot be used.
    """
    _check_split(validation_fraction, validation_path)
    builder = _Builder(
        tokenize=tokenize,
        image_transform=image_transform,
        image_folder=image_folder,
        tokens_per_image=tokens_per_image,
        model_max_length=model_max_length,
        on_bad_sample=on_bad_sample,
        check_images=check_images,
        exif_transpose=exif_transpose,
    )
    train, report = builder.build(data_path)
    if validation_path is not None:
        validation, validation_report = builder.build(validation_path)
        return BuiltDatasets(train, validation, report, validation_report)
    if validation_fraction:
        train, validation = split_dataset(train, validation_fraction, seed)
        return BuiltDatasets(train, validation, report)
    return BuiltDatasets(train, None, report)


def _check_split(validation_fraction: float, validation_path: str | PathLike[str] | None) -> None:
    if not 0.0 <= validation_fraction < 1.0:
        raise UserError(f"validation_fraction is {validation_fraction}; it must be at least 0 and below 1.")
    if validation_fraction and validation_path is not None:
        raise UserError(
            "validation_fraction and validation_data_path are both given. Use one of them: a share of the "
            "training records, or records of their own."
        )


def split_dataset(
    dataset: ConversationDataset, fraction: float, seed: int
) -> tuple[ConversationDataset, ConversationDataset]:
    """Hold out a share of the samples, at least one; both parts keep the order of the records.

    Returns:
        The rest, and what is held out.

    Raises:
        UserError: There are fewer than two samples.
    """
    if len(dataset) < 2:
        raise UserError(
            f"validation_fraction is {fraction}, but there is only {len(dataset)} usable record. "
            "Give more records, or leave it out."
        )
    num_held_out = min(max(1, round(len(dataset) * fraction)), len(dataset) - 1)
    shuffled = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).numpy()
    held_out, rest = np.sort(shuffled[:num_held_out]), np.sort(shuffled[num_held_out:])
    return dataset.subset(rest), dataset.subset(held_out)


@dataclass(frozen=True)
class _Builder:
    """Makes one data set of one file."""

    tokenize: Callable[[Sample], TokenizedSample]
    image_transform: ImageTransform | None
    image_folder: str | PathLike[str] | None
    tokens_per_image: int
    model_max_length: int
    on_bad_sample: BadSamplePolicy
    check_images: ImageCheck
    exif_transpose: bool

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ("error", "skip"):
            raise UserError(f"on_bad_sample is {self.on_bad_sample!r}; it can be 'error' or 'skip'.")
        if self.check_images not in IMAGE_CHECKS:
            known = ", ".join(IMAGE_CHECKS)
            raise UserError(f"check_images is {self.check_images!r}; it can be {known}.")

    def build(self, path: str | PathLike[str]) -> tuple[ConversationDataset, DataReport]:
        records = load_records(Path(path))
        num_records = len(records)
        errors: list[BadSampleError] = []
        prepared, more_errors = prepare_samples(
            self._parse(records, errors),
            self.tokenize,
            tokens_per_image=self.tokens_per_image,
            max_length=self.model_max_length,
        )
        image_errors = self._find_bad_images(prepared)
        errors = sorted([*errors, *more_errors, *image_errors.values()], key=lambda error: error.index)
        rows = np.array([row for row in range(len(prepared)) if row not in image_errors], dtype=np.int64)
        report = DataReport(
            path=str(path),
            num_records=num_records,
            num_usable=len(rows),
            errors=errors,
            num_truncated=int(prepared.was_truncated[rows].sum()),
            num_tokens=int(prepared.lengths[rows].sum()),
            num_supervised=int(prepared.num_supervised[rows].sum()),
            num_images=int(prepared.num_images[rows].sum()),
        )
        apply_policy(report, self.on_bad_sample)
        reader = None
        if self.image_transform is not None:
            places = [ImagePlace(self.image_folder)]
            reader = ImageReader(self.image_transform, places, exif_transpose=self.exif_transpose)
        dataset = ConversationDataset(prepared, image_reader=reader, rows=rows)
        return dataset, report

    def _parse(self, records: list[object], errors: list[BadSampleError]) -> Iterator[Sample]:
        """Check each record, and let go of it; put what cannot be used into `errors`."""
        for index in range(len(records)):
            record, records[index] = records[index], None
            try:
                sample = parse_record(record, index)
            except BadSampleError as error:
                errors.append(error)
                continue
            if sample.images:
                self._check_image_source(sample)
            yield sample

    def _check_image_source(self, sample: Sample) -> None:
        """Refuse a run that cannot read images at all at the first record that has some."""
        name = f"Sample {sample.index}" + (f" (id {sample.id!r})" if sample.id else "")
        if self.image_transform is None:
            raise UserError(
                f"{name} has images, but the model has no vision tower. Pass --vision_tower, start from a "
                "LLaVA checkpoint, or take the images out of the records."
            )
        relative = [image for image in sample.images if not Path(image).is_absolute()]
        if relative and self.image_folder is None:
            raise UserError(
                f"{name} has the image {relative[0]!r}, a relative path, but there is no image folder. "
                "Pass --image_folder."
            )
        if relative and self.image_folder is not None and not Path(self.image_folder).is_dir():
            raise UserError(
                f"The image folder {str(self.image_folder)!r} is not a directory, but {name} has images in "
                "it. Check --image_folder."
            )

    def _find_bad_images(self, prepared: PreparedSamples) -> dict[int, BadSampleError]:
        """Check every image of every sample; name the first bad one of a sample."""
        errors: dict[int, BadSampleError] = {}
        paths_of: dict[int, list[str]] = {}
        for row in range(len(prepared)):
            try:
                if images := prepared.images(row):
                    paths_of[row] = [resolve_image_path(image, self.image_folder) for image in images]
            except ImageError as error:
                errors[row] = prepared.bad_sample(row, error.kind, str(error))
        bad = find_bad_images((path for paths in paths_of.values() for path in paths), self.check_images)
        if bad:
            for row, paths in paths_of.items():
                for path in paths:
                    if path in bad:
                        errors[row] = prepared.bad_sample(row, bad[path].kind, str(bad[path]))
                        break
        return errors
