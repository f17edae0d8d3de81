"""A copy of the records that can be used, with repairs where only one is possible.

A record that can be used is written as it is, keys that nobody knows included. One that cannot is left out, unless
one of the repairs below makes it usable; they are tried in order and on top of each other, and none is kept that is
not needed. The original is only read.
"""

import copy
import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Final

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.image_files import ImagePlace
from llava_ft.data.preparation.image_facts import ImageChecks
from llava_ft.data.preparation.samples import DataPlan
from llava_ft.data.records import parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.errors import BadSampleError, RunError, UserError
from llava_ft.geometry import SizeWH
from llava_ft.inspection.check_source import NUM_EXAMPLES, SourceCheck, decode_images, read_in_parts

_SUFFIXES: Final = (".json", ".jsonl")
_ROLES: Final = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "system": "system"}

Record = dict[str, Any]


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


def write_fixed(check: SourceCheck, path: Path, plan: DataPlan) -> dict[str, Any]:
    """Write the records of a checked source that can be used to a file that `check_target` let pass.

    Returns what was written as JSON values, which `docs/how-to/check-data.md` describes.

    Raises:
        UserError: The records cannot be written as JSON, or none is left.
        RunError: The file cannot be written.
    """
    unusable = check.unusable()
    left_out, repaired = dict(unusable), dict[str, list[int]]()
    is_list = path.suffix.lower() == ".json"
    before, between, after = ("[\n", ",\n", "\n]\n") if is_list else ("", "\n", "\n")
    written = 0
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            staged = Path(folder) / path.name
            with staged.open("w", encoding="utf-8") as file:
                for lines in read_in_parts(partial(_fix, check.source, plan, frozenset(unusable)), check.source, plan):
                    for index, line, repairs in lines:
                        file.write((between if written else before) + line)
                        written += 1
                        left_out.pop(index, None)
                        for name in repairs:
                            repaired.setdefault(name, []).append(index)
                file.write(after)
            if not written:
                raise UserError(f"None of the {len(check.source)} records can be used, so {path} is not written.")
            staged.rename(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}. Free some space or name another file.") from error
    return {
        "path": str(path),
        "written": written,
        "left_out": dict(Counter(left_out.values())),
        "repaired": {name: indices[:NUM_EXAMPLES] for name, indices in repaired.items()},
        "repaired_counts": {name: len(indices) for name, indices in repaired.items()},
    }


def _fix(
    source: RecordSource, plan: DataPlan, unusable: frozenset[int], part: tuple[int, int]
) -> list[tuple[int, str, list[str]]]:
    """Give position, JSON text and names of the repairs of each record in a range that can be used."""
    lines: list[tuple[int, str, list[str]]] = []
    for index, record in enumerate(source.read(*part), start=part[0]):
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
        lines.append((index, text, names))
    return lines


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
            if plan.judge(parse_record(repaired, index), source, _decode)[1] is not None:
                return repaired, names
        except BadSampleError:
            continue
    return None


def _decode(image: str, place: ImagePlace, checks: ImageChecks) -> SizeWH:
    """Give the size of an image that can be decoded."""
    (decoded,) = decode_images(place, checks, [image])
    if decoded.error is not None:
        raise decoded.error
    return decoded.size_wh


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
