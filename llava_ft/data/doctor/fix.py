"""A copy of the records that can be used, with repairs where only one is possible.

A record that can be used is written as it is, keys that nobody knows included. One that cannot is left out, unless
one of the repairs below makes it usable; they are tried in order and on top of each other, and none is kept that is
not needed. The original is only read.
"""

import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO, cast

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.doctor.check import NUM_EXAMPLES, SourceCheck
from llava_ft.data.doctor.pictures import ImageTask, examine_images
from llava_ft.data.doctor.records import RECORDS_PER_TASK, Plan, RecordTask
from llava_ft.data.doctor.report import FixReport
from llava_ft.data.doctor.workers import Workers, context
from llava_ft.data.inspection.judge import judge
from llava_ft.data.records import parse_record
from llava_ft.errors import BadSampleError, RunError, UserError

_SUFFIXES: Final = (".json", ".jsonl")
_ROLES: Final = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "system": "system"}

Record = dict[str, Any]


@dataclass(frozen=True)
class _FixTask:
    """A range of records, and which of them cannot be used as they are."""

    records: RecordTask
    unusable: frozenset[int]


@dataclass(frozen=True)
class _Fixed:
    """What is to be written: JSON texts; and which records were repaired how; or why nothing can be written."""

    lines: list[str]
    repaired: list[tuple[int, tuple[str, ...]]]
    refused: str = ""


def check_target(path: Path, originals: list[str]) -> None:
    """Refuse a file that cannot or must not be written, before the work is done.

    Args:
        path: The file.
        originals: The sources of the run.

    Raises:
        UserError: It exists, has another suffix, or its folder is not there.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"--fix is {str(path)!r}; the name must end in .json (one list) or .jsonl (one record a line).")
    if path.exists():
        what = "is the data itself" if str(path) in originals else "exists already"
        raise UserError(f"--fix is {str(path)!r}, which {what}. Nothing is overwritten; name another file.")
    if not path.parent.is_dir():
        raise UserError(f"--fix is {str(path)!r}, but {str(path.parent)!r} is not a folder. Make it first.")


def write_fixed(check: SourceCheck, path: Path, workers: Workers) -> FixReport:
    """Write the records that can be used.

    Args:
        check: What was found.
        path: The file, from `check_target`.
        workers: Processes that were given the run's `Plan`.

    Raises:
        UserError: The records cannot be written as JSON, or none is left.
        RunError: The file cannot be written.
    """
    kinds = check.unusable()
    report = FixReport(str(path), 0, {}, {}, {})
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            staged = Path(folder) / path.name
            with staged.open("w", encoding="utf-8") as file:
                written = _write(check, kinds, file, workers, report, as_list=path.suffix.lower() == ".json")
            if not written:
                raise UserError(f"None of the {check.num_records} records can be used, so {path} is not written.")
            staged.rename(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Free some space or name another file.") from error
    left_out: dict[str, int] = {}
    for kind in kinds.values():
        left_out[kind] = left_out.get(kind, 0) + 1
    return FixReport(str(path), written, left_out, report.repaired, report.repaired_counts)


def _write(
    check: SourceCheck, kinds: dict[int, str], file: TextIO, workers: Workers, report: FixReport, *, as_list: bool
) -> int:
    """Write the records, and take those that are repaired out of `kinds`."""
    source = check.source
    starts = range(0, len(source), RECORDS_PER_TASK)
    tasks = (
        _FixTask(task, frozenset(index for index in range(task.start, task.stop) if index in kinds))
        for task in (RecordTask(source, start, min(start + RECORDS_PER_TASK, len(source))) for start in starts)
    )
    written = 0
    for fixed in workers.map(fix_records, tasks, _killed):
        if fixed.refused:
            raise UserError(fixed.refused)
        for line in fixed.lines:
            before = ("[\n" if written == 0 else ",\n") if as_list else ""
            file.write(before + line + ("" if as_list else "\n"))
            written += 1
        for index, names in fixed.repaired:
            del kinds[index]
            for name in names:
                report.repaired_counts[name] = report.repaired_counts.get(name, 0) + 1
                if len(report.repaired.setdefault(name, [])) < NUM_EXAMPLES:
                    report.repaired[name].append(index)
    if as_list:
        file.write("\n]\n")
    return written


def fix_records(task: _FixTask) -> _Fixed:
    """Give some records as they are to be written."""
    plan: Plan = context()
    fixed = _Fixed([], [])
    source, start, stop = task.records.source, task.records.start, task.records.stop
    for index, record in enumerate(source.read(start, stop), start=start):
        result, names = record, ()
        if index in task.unusable:
            found = _repair(record, index, plan, task.records)
            if found is None:
                continue
            result, names = found
        try:
            fixed.lines.append(_as_json(result))
        except TypeError:
            return _Fixed([], [], _HAS_CONTENT.format(index=index, name=source.name))
        if names:
            fixed.repaired.append((index, names))
    return fixed


_HAS_CONTENT: Final = (
    "--fix writes JSON, and record {index} of {name} holds more than text: the images in it would be lost. Train with "
    "--on_bad_sample skip instead, or write the images to files first."
)


def _repair(record: object, index: int, plan: Plan, where: RecordTask) -> tuple[Record, tuple[str, ...]] | None:
    """Try one repair after the other until the record can be used."""
    turns = _turns_of(record)
    if turns is None:
        return None
    repaired: Record = copy.deepcopy(cast("Record", record))
    names: list[str] = []
    for name, apply in REPAIRS.items():
        if apply(repaired):
            names.append(name)
            if _is_usable(repaired, index, plan, where):
                return repaired, tuple(names)
    return None


def _turns_of(record: object) -> list[Record] | None:
    """Give the turns of a record in LLaVA's form, if each is an object with two texts."""
    if not isinstance(record, dict):
        return None
    turns = cast("Record", record).get("conversations")
    if not isinstance(turns, list):
        return None
    for turn in cast("list[object]", turns):
        if not isinstance(turn, dict):
            return None
        fields = cast("Record", turn)
        if not isinstance(fields.get("from"), str) or not isinstance(fields.get("value"), str):
            return None
    return cast("list[Record]", turns)


def name_roles(record: Record) -> bool:
    """Write `user` as `human`, `assistant` as `gpt`, and the known roles in small letters without blanks around."""
    changed = False
    for turn in record["conversations"]:
        meant = _ROLES.get(turn["from"].strip().lower())
        if meant is not None and meant != turn["from"]:
            turn["from"] = meant
            changed = True
    return changed


def drop_blank_turns(record: Record) -> bool:
    """Leave out turns without text before the first question and after the last turn with text."""
    turns: list[Record] = record["conversations"]
    first = 1 if turns and turns[0]["from"] == "system" else 0
    start, end = first, len(turns)
    while start < end and not turns[start]["value"].strip():
        start += 1
    while end > start and not turns[end - 1]["value"].strip():
        end -= 1
    if (start, end) == (first, len(turns)) or start == end or turns[start]["from"] != "human":
        return False
    record["conversations"] = [*turns[:first], *turns[start:end]]
    return True


def add_placeholder(record: Record) -> bool:
    """Put `<image>` before the first question of a record with one image and no placeholder."""
    image = record.get("image")
    images = cast("list[object]", image) if isinstance(image, list) else [image]
    turns: list[Record] = record["conversations"]
    if len(images) != 1 or not isinstance(images[0], str) or any(IMAGE_TOKEN in turn["value"] for turn in turns):
        return False
    question = next((turn for turn in turns if turn["from"] == "human"), None)
    if question is None:
        return False
    question["value"] = f"{IMAGE_TOKEN}\n{question['value']}"
    return True


REPAIRS: Final = {
    "roles renamed": name_roles,
    "blank turns removed": drop_blank_turns,
    "<image> added to the first question": add_placeholder,
}
"""What each repair is called, in the order in which they are tried."""


def _is_usable(record: Record, index: int, plan: Plan, where: RecordTask) -> bool:
    try:
        sample = parse_record(record, index)
        tokens = plan.tokenize(sample)
        place = plan.place_of(where.source)
        decoded = examine_images(ImageTask(place, sample.images, plan.check_images, plan.exif_transpose))
        if any(image.problem for image in decoded):
            return False
        judge(sample, tokens, [(image.width, image.height) for image in decoded], plan.limits)
    except BadSampleError:
        return False
    return True


def _as_json(record: object) -> str:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a character in a key that nobody reads
        return json.dumps(record)
    return text


def _killed(task: _FixTask) -> _Fixed:
    first, last = task.records.start, task.records.stop - 1
    raise RunError(
        f"The process that repaired records {first} to {last} was ended from outside, most likely because memory ran "
        "out. Give fewer --workers."
    )
