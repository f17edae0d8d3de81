"""A copy of the records that can be used, with repairs where only one is possible.

A record that can be used is written as it is, keys that nobody knows included. One that cannot is left out, unless
one of the repairs below makes it usable; they are tried in order and on top of each other, and none is kept that is
not needed. The original is only read.
"""

import copy
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.preparation.prepare import RECORDS_FOR_PROCESSES
from llava_ft.data.preparation.processes import run_tasks
from llava_ft.data.records import parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.errors import BadSampleError, RunError, UserError
from llava_ft.inspection.check_source import NUM_EXAMPLES, SourceCheck, decode_images, ranges_of
from llava_ft.inspection.data_plan import DataPlan

_SUFFIXES: Final = (".json", ".jsonl")
_ROLES: Final = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "system": "system"}

Record = dict[str, Any]


@dataclass(frozen=True)
class FixReport:
    """What was written by a repair; the keys of the JSON report in `docs/check_data.md`."""

    path: str
    written: int
    left_out: dict[str, int]  # unusable records, by kind
    repaired: dict[str, list[int]]  # by repair, the positions of the first `NUM_EXAMPLES` records that were changed
    repaired_counts: dict[str, int]  # by repair, how many they are


def check_target(path: Path, originals: list[str]) -> None:
    """Refuse a file that cannot or must not be written, before the work is done; `originals` are the run's sources.

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


def write_fixed(check: SourceCheck, path: Path, plan: DataPlan) -> FixReport:
    """Write the records of a checked source that can be used to a file that `check_target` let pass.

    Raises:
        UserError: The records cannot be written as JSON, or none is left.
        RunError: The file cannot be written.
    """
    kinds = check.unusable()
    tasks = (
        (start, stop, frozenset(index for index in range(start, stop) if index in kinds))
        for start, stop in ranges_of(check.source)
    )
    num_processes = plan.preparation.processes if len(check.source) >= RECORDS_FOR_PROCESSES else 1
    as_list = path.suffix.lower() == ".json"
    written = 0
    repaired: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            staged = Path(folder) / path.name
            with staged.open("w", encoding="utf-8") as file:
                for lines, repairs in run_tasks(partial(_fix, check.source, plan), tasks, num_processes):
                    for line in lines:
                        before = ("[\n" if written == 0 else ",\n") if as_list else ""
                        file.write(before + line + ("" if as_list else "\n"))
                        written += 1
                    for index, names in repairs:
                        del kinds[index]
                        for name in names:
                            counts[name] = counts.get(name, 0) + 1
                            if len(repaired.setdefault(name, [])) < NUM_EXAMPLES:
                                repaired[name].append(index)
                if as_list:
                    file.write("\n]\n")
            if not written:
                raise UserError(f"None of the {len(check.source)} records can be used, so {path} is not written.")
            staged.rename(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Free some space or name another file.") from error
    return FixReport(str(path), written, dict(Counter(kinds.values())), repaired, counts)


def _fix(
    source: RecordSource, plan: DataPlan, task: tuple[int, int, frozenset[int]]
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Give a range of records as JSON texts, and the positions of repaired ones with the names of the repairs.

    A task is the first record, the one after the last, and those that cannot be used as they are.
    """
    start, stop, unusable = task
    lines: list[str] = []
    repairs: list[tuple[int, list[str]]] = []
    for index, record in enumerate(source.read(start, stop), start=start):
        names: list[str] = []
        if index in unusable:
            found = _repair(record, index, source, plan)
            if found is None:
                continue
            record, names = found
        try:
            text = json.dumps(record, ensure_ascii=False)
            text.encode("utf-8")
        except TypeError:
            raise UserError(
                f"--fix writes JSON, and record {index} of {source.name} holds more than text: the images in it would "
                "be lost. Train with --on_bad_sample skip instead, or write the images to files first."
            ) from None
        except UnicodeEncodeError:  # half a character in a key that nobody reads
            text = json.dumps(record)
        lines.append(text)
        if names:
            repairs.append((index, names))
    return lines, repairs


def _repair(record: object, index: int, source: RecordSource, plan: DataPlan) -> tuple[Record, list[str]] | None:
    """Try one repair after the other until the record, with turns in LLaVA's form, can be used."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    ):
        return None
    repaired: Any = copy.deepcopy(record)
    names: list[str] = []
    for name, apply in REPAIRS.items():
        if not apply(repaired):
            continue
        names.append(name)
        try:
            sample = parse_record(repaired, index)
            tokens = plan.tokenize(sample)
            decoded = decode_images(plan.place_of(source), plan.checks, sample.images)
            if any(image.error for image in decoded):
                continue
            plan.layout(sample, tokens, [image.size_wh for image in decoded]).judge(plan.limits)
        except BadSampleError:
            continue
        return repaired, names
    return None


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
    images = image if isinstance(image, list) else [image]
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
