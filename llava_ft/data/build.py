"""From the paths of a run to its data sets: open, prepare, measure, check, split."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike
from typing import Final

import numpy as np
import torch

from llava_ft.data.dataset import ConversationDataset, JoinedSamples
from llava_ft.data.image_files import is_relative, refuse_unreadable_images
from llava_ft.data.image_reader import ImageReader
from llava_ft.data.images import ImageTransform
from llava_ft.data.preparation.image_facts import look_at_images
from llava_ft.data.preparation.prepare import prepare_rows
from llava_ft.data.preparation.samples import DataPlan, Samples, find_samples
from llava_ft.data.records import parse_record
from llava_ft.data.report import (
    BAD_SAMPLE_POLICIES,
    BadSamplePolicy,
    DataReport,
    check_policies,
    log_report,
    name_of,
    total,
)
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.data_path import DataSources, holds_out, is_mixture
from llava_ft.errors import BadSampleError, UserError

_RECORDS_TO_PEEK_AT: Final = 100


@dataclass(frozen=True)
class BuiltDatasets:
    """What a run trains and evaluates on."""

    train: ConversationDataset
    validation: ConversationDataset | None
    report: DataReport  # of the training data, held-out records included
    validation_report: DataReport | None = None  # of validation data of its own


def build_datasets(
    data_path: str | PathLike[str],
    plan: DataPlan,
    *,
    image_transform: ImageTransform | None,
    on_bad_sample: BadSamplePolicy = "error",
    fast_decode: bool = False,
    validation_path: str | PathLike[str] | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> BuiltDatasets:
    """Prepare, check, measure and split the records of a run.

    Args:
        data_path: Training records, see `docs/reference/data-format.md`.
        plan: How they are read.
        image_transform: Prepares one picture; None for a model without vision tower.
        on_bad_sample: "error" raises if any record cannot be used; "skip" leaves it out, counts and logs it.
        fast_decode: Whether large photographs may be shrunk while they are decoded.
        validation_path: Validation records.
        validation_fraction: Share of the usable training records that is held out instead, at least one record.
        seed: Decides which records are held out, and which a mixture takes.

    Raises:
        UserError: The records, or what is asked of them, cannot be used.
        RunError: They could not be prepared.
    """
    # Contradictions about what is validated on, before anything takes time.
    if not 0.0 <= validation_fraction < 1.0:
        raise UserError(f"validation_fraction is {validation_fraction}; it must be at least 0 and below 1.")
    if validation_fraction and validation_path is not None:
        raise UserError(
            "validation_fraction and validation_data_path are both given. Use one of them: a share of the "
            "training records, or records of their own."
        )
    if validation_fraction and is_mixture(data_path):
        raise UserError(
            f"validation_fraction is {validation_fraction}, and {data_path} is a mixture, which may take a record "
            "several times. Say in it, with held_out, what each source keeps for validation."
        )
    if validation_path is not None and holds_out(data_path):
        raise UserError(
            f"{data_path} holds out records for validation (held_out), and validation_data_path is given. Use one of "
            "the two."
        )
    if validation_path is not None and holds_out(validation_path):
        raise UserError(
            f"The validation data {validation_path} holds out records itself (held_out). Take held_out out of it, or "
            "train on it and leave validation_data_path out."
        )
    if on_bad_sample not in BAD_SAMPLE_POLICIES:
        raise UserError(f"on_bad_sample is {on_bad_sample!r}; it can be 'error' or 'skip'.")

    def build(path: str) -> tuple[ConversationDataset, ConversationDataset | None, DataReport]:
        """Make the data set of a path, that of what a mixture holds out, and the report."""
        data = DataSources.open(path, plan.preparation.directory)
        parts = [
            _find_samples(source, plan, prefix, has_tower=image_transform is not None)
            for source, prefix in zip(data.sources, data.prompt_prefixes, strict=True)
        ]
        reports = [_report(source, samples) for source, samples in zip(data.sources, parts, strict=True)]
        report = reports[0] if data.mixture is None else total(path, reports)
        max_length = plan.limits.max_length
        check_policies(report, on_bad_sample, max_length=max_length, refuses_long=plan.limits.truncation == "error")
        chosen = data.choose([len(part) for part in parts], seed)
        if data.mixture is not None:
            counts = zip(reports, chosen.train, chosen.held_out, strict=True)
            reports = [replace(part, num_taken=len(taken), num_held_out=len(held)) for part, taken, held in counts]
            report = total(path, reports)
        log_report(report, max_length=max_length)
        reader = None
        if image_transform is not None:
            places = [plan.place_of(source) for source in data.sources]
            reader = ImageReader(
                image_transform, places, exif_transpose=plan.checks.exif_transpose, fast_decode=fast_decode
            )
        samples = JoinedSamples(parts, [source.name for source in data.sources])
        train, held_out = (
            ConversationDataset(samples, image_reader=reader, rows=np.concatenate(rows))
            for rows in (chosen.train, chosen.held_out)
        )
        return train, held_out if len(held_out) else None, report

    train, held_out, report = build(str(data_path))
    if validation_path is not None:
        validation, _, validation_report = build(str(validation_path))
        return BuiltDatasets(train, validation, report, validation_report)
    if validation_fraction:
        train, held_out = split_dataset(train, validation_fraction, seed)
    return BuiltDatasets(train, held_out, report)


def split_dataset(
    dataset: ConversationDataset, fraction: float, seed: int
) -> tuple[ConversationDataset, ConversationDataset]:
    """Give the samples without a share, at least one, and that share; both keep the order of the records.

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
    return dataset.subset(np.sort(shuffled[num_held_out:])), dataset.subset(np.sort(shuffled[:num_held_out]))


def _find_samples(source: RecordSource, plan: DataPlan, prompt_prefix: str, *, has_tower: bool) -> Samples:
    """Measure the records of a source; a run that could not read any image of them is refused."""
    place = plan.place_of(source)

    def check_images_can_be_read(index: int, sample_id: str, images: Sequence[str]) -> None:
        name = f"Sample {index}" + (f" (id {sample_id!r})" if sample_id else "")
        refuse_unreadable_images(name, images, place, has_tower=has_tower)

    # Of the first records before minutes are spent on the text, then of all, at the first one with a relative path.
    for index, record in enumerate(source.read(0, min(_RECORDS_TO_PEEK_AT, len(source)))):
        with suppress(BadSampleError):
            sample = parse_record(record, index)
            check_images_can_be_read(index, sample.id, sample.images)
    rows, facts = prepare_rows(source, plan.tokenize, plan.preparation, prompt_prefix=prompt_prefix), None
    if rows.counts("image_positions").any():
        numbers, images = rows.numbered_images()
        first = next((number for number, image in enumerate(images) if is_relative(image)), 0)
        entry = int(np.argmax(numbers == first))
        record = int(np.searchsorted(np.cumsum(rows.counts("image_positions")), entry, side="right"))
        check_images_can_be_read(record, rows.sample_id(record), rows.images(record))
        facts = look_at_images(rows, place, plan.checks, plan.preparation)
    return find_samples(rows, plan.limits, facts)


def _report(source: RecordSource, samples: Samples) -> DataReport:
    truncated: list[int] = samples.record_indices[samples.was_truncated].tolist()
    too_long: list[int] = samples.too_long.tolist() if samples.limits.truncation != "truncate" else []
    return DataReport(
        path=source.name,
        fingerprint=source.fingerprint(),
        image_folder=None if source.image_folder is None else str(source.image_folder),
        num_records=len(samples.rows),
        num_usable=len(samples),
        errors=samples.errors,
        num_truncated=len(truncated),
        num_too_long=len(too_long),
        num_lost_tokens=samples.num_lost_tokens,
        longest=samples.longest,
        num_tokens=int(samples.lengths.sum(dtype=np.int64)),
        num_supervised=int(samples.num_supervised.sum(dtype=np.int64)),
        num_images=int(samples.num_images.sum(dtype=np.int64)),
        truncated_ids=[name_of(samples.rows.sample_id(record), record) for record in truncated],
        too_long_ids=[name_of(samples.rows.sample_id(record), record) for record in too_long],
    )
