"""`llava-ft check-data`: what a run will find in its data, before it starts."""

import json
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
from transformers import TrainingArguments

from llava_ft.args import ParsedArgs
from llava_ft.data.preparation.samples import DataPlan
from llava_ft.data.sources.data_path import DataSources
from llava_ft.errors import UserError
from llava_ft.inspection.check_report import as_text, report_page
from llava_ft.inspection.check_source import SourceCheck, check_source
from llava_ft.inspection.findings import find_all
from llava_ft.inspection.pages import write_page
from llava_ft.inspection.repair import check_target, write_fixed
from llava_ft.inspection.statistics import count_all, count_epoch

logger = logging.getLogger(__name__)

_JSON_FORMAT: Final = 1


def run_check_data(
    args: ParsedArgs,
    plan: DataPlan,
    output: TextIO,
    *,
    fix: Path | None = None,
    html: Path | None = None,
    as_json: bool = False,
) -> bool:
    """Check the data of a run, write what was found as text or JSON, and say whether nothing would stop or spoil it.

    `html` gets the report as a page as well, and `fix` the records that can be used.

    Raises:
        UserError: The request is wrong.
        RunError: A file could not be written, or a process was killed.
    """
    assert args.data.data_path is not None
    training = DataSources.open(args.data.data_path, plan.preparation.directory)
    if fix is not None:
        if training.mixture is not None:
            raise UserError("--fix writes one file, and a mixture has several sources. Check each of them on its own.")
        check_target(fix, [args.data.data_path, str(args.data.validation_data_path)])
    opened = {"training": training}
    if args.data.validation_data_path:
        opened["validation"] = DataSources.open(args.data.validation_data_path, plan.preparation.directory)

    checks: list[SourceCheck] = []
    data_sets: list[dict[str, Any]] = []
    for use, data in opened.items():
        for source, prefix in zip(data.sources, data.prompt_prefixes, strict=True):
            check = check_source(source, plan, prompt_prefix=prefix)
            findings = [asdict(finding) for finding in find_all(check, args.data.on_bad_sample)]
            numbers = count_all(check, plan.limits)
            checks.append(check)
            data_sets.append({"name": source.name, "use": use, "statistics": numbers, "findings": findings})
    fixed = write_fixed(checks[0], fix, plan) if fix is not None else None
    epoch, refused = None, None
    try:
        epoch = _epoch(args, plan, checks[: len(training.sources)], training)
    except UserError as error:  # the mixture asks for more than the usable records give
        refused = str(error)
    has_errors = any(finding["severity"] == "error" for data in data_sets for finding in data["findings"])
    report = {
        "format": _JSON_FORMAT,
        "passed": not has_errors and refused is None,
        "data_sets": data_sets,
        "epoch": epoch,
        "fix": fixed,
        "refused": refused,
    }

    if html is not None:
        write_page(html, report_page(report, checks, plan))
        logger.info("The report is in %s.", html)
    output.write(json.dumps(report, indent=1) + "\n" if as_json else as_text(report, is_terminal=output.isatty()))
    return report["passed"]


def _epoch(args: ParsedArgs, plan: DataPlan, checks: list[SourceCheck], data: DataSources) -> dict[str, Any] | None:
    """Put together what an epoch takes of each source; nothing if one has no usable record."""
    # Building `TrainingArguments` would look for devices.
    settings: dict[str, Any] = {field.name: field.default for field in fields(TrainingArguments)} | dict(args.inherited)
    counts = [len(check.columns["index"]) for check in checks]
    if not all(counts):
        return None
    seed = int(settings["seed"] if settings["data_seed"] is None else settings["data_seed"])
    rows = np.concatenate(data.choose(counts, seed).train)
    lengths, supervised = (
        np.concatenate([check.columns[name] for check in checks])[rows] for name in ("kept_tokens", "kept_supervised")
    )
    batch_size = int(settings["per_device_train_batch_size"])
    return count_epoch(lengths, supervised, max_length=plan.limits.max_length, batch_size=batch_size, seed=seed)
