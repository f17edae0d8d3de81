"""A lineage as lines of text: newest first, what it came from below it and further to the right."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

_STEP = "  "
_DIGITS = 12


def lineage_lines(path: Path, record: Mapping[str, Any]) -> list[str]:
    """Write the chain of a directory as text.

    Args:
        path: The directory.
        record: Content of its `lineage.json`.
    """
    return [str(path.resolve()), *_record_lines(record, _STEP)]


def _record_lines(record: Mapping[str, Any], indent: str) -> Iterator[str]:
    details = cast("Mapping[str, Any]", record.get("details") or {})
    yield indent + ", ".join(_heading(record, details))
    inner = indent + _STEP
    for resumption in cast("Sequence[Mapping[str, Any]]", details.get("resumptions") or ()):
        yield f"{inner}resumed from {resumption.get('from')} ({resumption.get('time')})"
    for problem in cast("Sequence[str]", details.get("ignored") or ()):
        yield f"{inner}ignored: {problem}"
    for source in cast("Sequence[Mapping[str, Any]]", record.get("data") or ()):
        yield inner + _data_line(source)
    base = cast("Mapping[str, Any] | None", record.get("base"))
    if base is not None:
        yield from _ancestor_lines("base", base, inner)
    for parent in cast("Sequence[Mapping[str, Any]]", record.get("parents") or ()):
        yield from _ancestor_lines("from", parent, inner)


def _heading(record: Mapping[str, Any], details: Mapping[str, Any]) -> Iterator[str]:
    yield str(record.get("action"))
    start = cast("Mapping[str, Any] | None", details.get("start"))
    if start:
        yield f"adapter_mode {start.get('mode')}"
    if "step" in details:
        yield f"step {details['step']}"
    yield str(record.get("time"))
    version = cast("Mapping[str, Any]", record.get("versions") or {}).get("llava_ft")
    if version:
        yield f"llava_ft {version}"
    if record.get("git_commit"):
        yield f"git {record['git_commit']}"


def _data_line(source: Mapping[str, Any]) -> str:
    facts = [f"{source.get('num_usable')} of {source.get('num_records')} records used", str(source.get("use"))]
    if source.get("weight") is not None:
        facts.append(f"weight {source['weight']:g}")
    if source.get("num_taken") is not None:
        facts.append(f"{source['num_taken']} an epoch")
    return f"data {source.get('path')} ({', '.join([*facts, _short(source.get('fingerprint'))])})"


def _ancestor_lines(role: str, entry: Mapping[str, Any], indent: str) -> Iterator[str]:
    path = str(entry.get("path"))
    facts = [str(entry[key]) for key in ("kind", "role") if entry.get(key)]
    facts.append(_short(entry.get("fingerprint")))
    if Path(path).is_absolute() and not Path(path).exists():
        facts.append("not there any more")
    yield f"{indent}{role} {path} ({', '.join(fact for fact in facts if fact)})"
    if entry.get("left_out"):
        yield f"{indent}{_STEP}{entry['left_out']}"
    record = cast("Mapping[str, Any] | None", entry.get("lineage"))
    if record is not None:
        yield from _record_lines(record, indent + _STEP)
    named = cast("Mapping[str, Any] | None", entry.get("base"))
    if named is not None:
        yield from _ancestor_lines("base", named, indent + _STEP)


def _short(fingerprint: object) -> str:
    """The first digits of a fingerprint, enough to tell two apart."""
    text = str(fingerprint or "")
    scheme, colon, digits = text.rpartition(":")
    return scheme + colon + digits[:_DIGITS]
