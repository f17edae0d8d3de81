"""What a step has to work on: the largest micro-batch, and what an epoch holds.

With the records here both are counted: the records are tokenised as in training, and kept for it. Images are not
opened; only with anyres their headers are read. The largest micro-batch is made of the longest records, those with most
supervised tokens and those with most images, as if they came together; no batch of the run is larger. Without records
every sample is taken to be as long as `model_max_length` allows, with one image, and half of its text supervised.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from llava_ft.args import ParsedArgs
from llava_ft.data.packing import pack
from llava_ft.data.preparation.image_facts import look_at_images
from llava_ft.data.preparation.prepare import PreparationSettings, prepare_rows
from llava_ft.data.preparation.samples import Samples, find_samples
from llava_ft.data.preparation.tokenized_rows import Array
from llava_ft.data.sampler import steps_per_epoch
from llava_ft.data.sources.data_path import DataSources
from llava_ft.errors import UserError
from llava_ft.geometry import SizeWH
from llava_ft.planning.request import PlanRequest
from llava_ft.planning.step import Batch
from llava_ft.resolve import RunModel

_SUPERVISED_SHARE: Final = 0.5
"""Share of the text positions that is taken to be supervised where the records are not here."""

_DEFAULT_SEED: Final = 42
"""That of `transformers.TrainingArguments`."""


@dataclass(frozen=True)
class Records:
    """The run's records, as the rows that batches are made of: samples, or with packing what is packed of them."""

    num_records: int  # in the file
    num_usable: int  # samples that can be tokenised, of a mixture those that it takes; images were not looked at
    lengths: Array  # positions of each row after truncation, longest first; empty without a tokenizer
    num_supervised: Array  # tokens of each row that have to be predicted, most first
    num_images: Array  # of each row, most first
    num_tiles: int = 0  # of all images that the records name, each name counted once


@dataclass(frozen=True)
class Workload:
    """What steps and epochs are made of."""

    records: Records | None  # if they are here
    max_length: int  # positions after which a sample is cut off
    tokens_per_image: int  # with anyres of the largest image that fits into a sample; 0 for a text-only model
    image_size_wh: SizeWH | None  # of that image, in pixels; None without anyres
    validation_fraction: float  # share of the records that is held out
    notes: list[str]  # what was assumed
    rows: Literal["padded", "packed", "joined"]  # a row of a batch: a sample, several, or all of the batch

    @property
    def measured(self) -> Records | None:
        """The records if they were tokenised and not only counted."""
        return self.records if self.records is not None and len(self.records.lengths) else None

    def largest_batch(self, size: int, *, supervise_all: bool = False) -> Batch:
        """Return the micro-batch of `size` samples or packed rows that takes most memory.

        With `supervise_all` all text is supervised, the most that can be, where the records are not here.
        """
        records, length = self.measured, self.max_length
        if records is None:
            num_images = size if 0 < self.tokens_per_image < length else 0
            text = size * (length - 1) - num_images * self.tokens_per_image
            supervised = text if supervise_all else round(text * _SUPERVISED_SHARE)
            is_padded = size > 1
        else:
            if self.rows != "packed":
                length = int(records.lengths[0])
            num_images = int(records.num_images[:size].sum())
            supervised = min(int(records.num_supervised[:size].sum()), size * (length - 1))
            is_padded = size > 1 and int(records.lengths[-1]) != length
        num_rows = size
        if self.rows == "packed":  # samples are kept apart by a mask, also in a batch of one row
            is_padded = True
        elif self.rows == "joined":
            length = size * length if records is None else int(records.lengths[:size].sum())
            num_rows, is_padded = 1, size > 1
        # Images that are smaller than all are taken to be may be more than there would be room for.
        room = num_rows * length // max(1, self.tokens_per_image)
        return Batch(num_rows, length, min(num_images, room), max(1, supervised), is_padded, self.image_size_wh)

    def epoch(self, request: PlanRequest) -> dict[str, int]:
        """Count what an epoch and the run hold; empty without records."""
        records = self.records
        if records is None:
            return {}
        num_train = records.num_usable
        if self.validation_fraction and num_train > 1:
            num_train -= min(max(1, round(num_train * self.validation_fraction)), num_train - 1)
        share, num_rows = num_train / records.num_usable, num_train
        counted = {"records": records.num_records, "usable_records": records.num_usable, "training_records": num_train}
        if self.rows == "packed" and self.measured:
            num_rows = math.ceil(len(records.lengths) * num_train / records.num_usable)
            counted["packed_rows"] = num_rows
        steps = steps_per_epoch(num_rows, request.batch_size, request.machine.world_size, request.accumulation)
        counted["steps_per_epoch"] = steps
        counted["steps"] = request.max_steps if request.max_steps > 0 else math.ceil(request.num_epochs * steps)
        if self.measured:
            counted["tokens_per_epoch"] = round(int(records.lengths.sum()) * share)
            counted["supervised_tokens_per_epoch"] = round(int(records.num_supervised.sum()) * share)
            counted["images_per_epoch"] = round(int(records.num_images.sum()) * share)
        return counted


def find_workload(args: ParsedArgs, run: RunModel) -> Workload:
    """Measure the records if they are here; say what is assumed if not.

    Raises:
        UserError: The records are here but cannot be read, or none is usable.
    """
    path, max_length, geometry = args.data.data_path, args.flags.model_max_length, run.config.image_geometry
    notes: list[str] = []
    records = None
    if not path:
        notes.append("No data_path is given, so steps and tokens per epoch are left out.")
    elif not Path(path).exists():
        notes.append(f"{path} is not on this machine, so steps and tokens per epoch are left out.")
    else:
        records = _measure(path, args, run, notes)
    if records is None or not len(records.lengths):
        images = "one image, " if run.spec.has_vision else ""
        notes.append(
            f"Samples are taken to be {max_length} positions long (model_max_length), with {images}"
            f"{_SUPERVISED_SHARE:.0%} of their text supervised. Shorter ones take less."
        )
    tokens_per_image, image_size_wh = run.config.tokens_per_image, None
    if geometry is not None and geometry.needs_image_sizes:
        image_size_wh = geometry.largest_size_within(max_length - 1)
        tokens_per_image = 0 if image_size_wh is None else geometry.num_tokens(image_size_wh)
        if image_size_wh is None:
            notes.append(
                f"No image fits into model_max_length={max_length}: the overview alone takes "
                f"{geometry.tokens_per_tile}."
            )
        else:
            notes.append(
                f"{geometry.aspect_ratio}: every image is taken to be {image_size_wh[0]} x {image_size_wh[1]} pixels, "
                f"the size that takes the most positions: {tokens_per_image:,}, from "
                f"{geometry.num_tiles(image_size_wh)} tiles. Other images take less."
            )
            if tokens_per_image < geometry.max_tokens:
                notes.append(
                    f"An image can take {geometry.max_tokens:,} positions, which model_max_length={max_length} has no "
                    "room for."
                )
    return Workload(
        records=records,
        max_length=max_length,
        tokens_per_image=tokens_per_image,
        image_size_wh=image_size_wh,
        validation_fraction=args.data.validation_fraction,
        notes=notes,
        rows="packed" if args.data.packing else "joined" if args.data.padding_free else "padded",
    )


def _measure(path: str, args: ParsedArgs, run: RunModel, notes: list[str]) -> Records:
    """Tokenise the records as `data/build.py` does, without refusing what is wrong with some of them."""
    cache_dir = Path(args.data.data_cache_dir) if args.data.data_cache_dir else None
    settings = PreparationSettings(cache_dir, args.data.preprocessing_num_workers)
    data, directory = DataSources.open(path, settings.directory), run.spec.directory.path
    num_records = sum(map(len, data.sources))
    given = (args.inherited.get("data_seed"), args.inherited.get("seed"), _DEFAULT_SEED)
    seed = next(value for value in given if isinstance(value, int))
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        name = run.args.model.model_name_or_path
        notes.append(f"{name} has no tokenizer on this machine, so the records are counted but not tokenised.")
        nothing = np.empty(0, dtype=np.int64)
        num_taken = sum(map(len, data.choose([len(source) for source in data.sources], seed).train))
        return Records(num_records, num_taken, nothing, nothing, nothing)

    plan, geometry = run.data_plan(), run.config.image_geometry
    limits, checks = plan.limits, replace(plan.checks, level="none", needs_sizes=True)
    parts: list[Samples] = []
    num_tiles = 0
    for source, prefix in zip(data.sources, data.prompt_prefixes, strict=True):
        rows, facts = prepare_rows(source, plan.tokenize, settings, prompt_prefix=prefix), None
        has_images = bool(rows.counts("image_positions").any())
        if has_images and geometry is not None and geometry.needs_image_sizes:  # lengths depend on them
            facts = look_at_images(rows, plan.place_of(source), checks, settings)
            if facts.errors:
                facts.sizes_wh[list(facts.errors)] = geometry.largest_size_within(limits.max_length - 1) or (1, 1)
                notes.append(
                    f"{len(facts.errors)} of {len(facts.sizes_wh)} images cannot be read on this machine; they are "
                    "taken to be as long as any."
                )
                facts.errors.clear()
            num_tiles += sum(geometry.num_tiles((width, height)) for width, height in facts.sizes_wh.tolist())
        elif has_images and geometry is not None:
            num_tiles += len(rows.numbered_images()[1])
        parts.append(find_samples(rows, limits, facts))
    num_usable = [len(part) for part in parts]
    if not any(num_usable):
        raise UserError(
            f"None of the {num_records} records of {path} can be used. `llava-ft inspect data` with the same flags "
            "says why for each."
        )
    num_bad, num_long = sum(len(part.errors) for part in parts), sum(len(part.too_long) for part in parts)
    if num_bad:
        notes.append(f"{num_bad} of {num_records} records cannot be used; `llava-ft inspect data` names them.")
    if limits.truncation != "truncate" and num_long:
        outcome = "the run will be refused" if limits.truncation == "error" else "they are left out"
        notes.append(
            f"{num_long} of {num_records} records are longer than model_max_length = {limits.max_length} (the longest "
            f"has {max(part.longest for part in parts)} tokens); with truncation {limits.truncation} {outcome}."
        )
    taken = np.concatenate(data.choose(num_usable, seed).train)
    counts = [
        np.concatenate([getattr(part, name) for part in parts])[taken].astype(np.int64)
        for name in ("lengths", "num_supervised", "num_images")
    ]
    if args.data.packing:
        packed = pack(counts[0], limits.max_length, seed)
        counts = [packed.totals(values) for values in counts]
    return Records(num_records, len(taken), *(np.sort(values)[::-1] for values in counts), num_tiles=num_tiles)
