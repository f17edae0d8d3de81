"""`llava-ft check-data`: what a run will find in its data, before it starts."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from transformers import TrainingArguments

from llava_ft.args import ParsedArgs
from llava_ft.data.doctor.check import SourceCheck, check_source
from llava_ft.data.doctor.findings import find_all
from llava_ft.data.doctor.fix import check_target, write_fixed
from llava_ft.data.doctor.records import Plan
from llava_ft.data.doctor.report import DataSetReport, FixReport, Report
from llava_ft.data.doctor.report_html import report_page
from llava_ft.data.doctor.report_text import as_text
from llava_ft.data.doctor.statistics import Epoch, count_all, count_epoch
from llava_ft.data.doctor.workers import Workers
from llava_ft.data.inspection.html import write_page
from llava_ft.data.inspection.terminal import has_color
from llava_ft.data.preparation.processes import num_cores
from llava_ft.data.preparation.progress import Progress
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.selection import DataSources
from llava_ft.errors import UserError
from llava_ft.training.data_model import find_data_model
from llava_ft.training.data_setup import preparation_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckOptions:
    """What is asked for beside the flags of a run.

    Attributes:
        fix: Where the records that can be used are written; None writes nothing.
        html: Where the report is written as a page; None writes none.
        as_json: Whether the report is JSON instead of text to read.
        num_workers: Processes; None means one for each core.
    """

    fix: Path | None = None
    html: Path | None = None
    as_json: bool = False
    num_workers: int | None = None


def run_check_data(args: ParsedArgs, output: TextIO, options: CheckOptions) -> bool:
    """Check the data of a run and write what was found.

    Args:
        args: The run's flags.
        output: Where the report goes.
        options: What else is asked for.

    Returns:
        Whether nothing was found that would stop or spoil the run.

    Raises:
        UserError: The request is wrong.
        RunError: A file could not be written, or a worker was killed.
    """
    if options.num_workers is not None and options.num_workers < 1:
        raise UserError(f"--workers is {options.num_workers}; it must be at least 1.")
    assert args.data.data_path is not None
    model = find_data_model(args)
    directory = preparation_settings(args).directory
    training = DataSources.open(args.data.data_path, directory)
    if options.fix is not None:
        if training.mixture is not None:
            raise UserError("--fix writes one file, and a mixture has several sources. Check each of them on its own.")
        check_target(options.fix, [args.data.data_path, str(args.data.validation_data_path)])
    opened = {"training": training}
    if args.data.validation_data_path:
        opened["validation"] = DataSources.open(args.data.validation_data_path, directory)
    plan = Plan(
        model.tokenize,
        model.limits,
        args.data.image_folder,
        args.data.check_images,
        args.data.image_exif_transpose,
    )
    checker = _Checker(args, plan)
    with Workers(options.num_workers or num_cores(), plan) as workers:
        reports = [
            checker.report(source, prefix, use, workers)
            for use, data in opened.items()
            for source, prefix in zip(data.sources, data.prompt_prefixes, strict=True)
        ]
        fix: FixReport | None = None
        if options.fix is not None:
            fix = write_fixed(reports[0].check, options.fix, workers)
    epoch, refused = None, ""
    try:
        epoch = checker.epoch([each.check for each in reports if each.use == "training"], training)
    except UserError as error:  # the mixture asks for more than the usable records give
        refused = str(error)
    report = Report(reports, epoch, fix, refused)
    if options.html is not None:
        places = [plan.place_of(each.check.source) for each in reports]
        write_page(options.html, report_page(report, places))
        logger.info("The report is in %s.", options.html)
    text = json.dumps(report.to_dict(), indent=1) if options.as_json else as_text(report, color=has_color(output))
    output.write(text + "\n")
    return report.passed


@dataclass(frozen=True)
class _Checker:
    """Checks sources with the flags of one run."""

    args: ParsedArgs
    plan: Plan

    def report(self, source: RecordSource, prompt_prefix: str, use: str, workers: Workers) -> DataSetReport:
        check = check_source(source, self.plan, workers, Progress, prompt_prefix=prompt_prefix)
        limits = self.plan.limits
        return DataSetReport(
            name=source.name,
            use=use,
            check=check,
            findings=find_all(check, self.args.data.on_bad_sample),
            statistics=count_all(check, max_length=limits.max_length, policy=limits.truncation),
        )

    def epoch(self, checks: list[SourceCheck], data: DataSources) -> Epoch | None:
        """Put together what an epoch takes of each source."""
        counts = [len(check.columns["index"]) for check in checks]
        if not all(counts):
            return None
        data_seed = _setting(self.args, "data_seed")
        seed = int(_setting(self.args, "seed") if data_seed is None else data_seed)
        rows = np.concatenate(data.choose(counts, seed).train)
        lengths, supervised = (
            np.concatenate([check.columns[name] for check in checks])[rows]
            for name in ("kept_tokens", "kept_supervised")
        )
        return count_epoch(
            lengths,
            supervised,
            max_length=self.plan.limits.max_length,
            batch_size=int(_setting(self.args, "per_device_train_batch_size")),
            seed=seed,
        )


def _setting(args: ParsedArgs, name: str) -> Any:
    """Give a field of `transformers.TrainingArguments` without building one, which would look for devices."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    return args.inherited.get(name, defaults[name])
