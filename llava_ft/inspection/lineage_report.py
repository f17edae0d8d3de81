"""`llava-ft inspect lineage`: what a directory was made from, back to the first base, as a tree."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from llava_ft.checkpoint.lineage import LINEAGE, read_lineage
from llava_ft.errors import UserError
from llava_ft.terminal import visible


def run_inspect_lineage(path: Path, output: TextIO, *, as_json: bool) -> None:
    """Write the lineage of a directory.

    Raises:
        UserError: It has no lineage, or a damaged one.
    """
    if not path.is_dir():
        raise UserError(f"{path} {'is a file' if path.exists() else 'does not exist'}. Give a directory of weights.")
    record = read_lineage(path)
    if record is None:
        raise UserError(
            f"{path} has no {LINEAGE}: another program wrote it, or a version of this one that kept none. `llava-ft "
            "inspect weights` says what it holds."
        )
    if as_json:
        output.write(json.dumps(record, indent=1) + "\n")
        return
    tree = Tree(_line(str(path.resolve())), guide_style="dim")
    _add_record(tree, record)
    Console(file=output, width=10_000).print(tree)  # so wide that no line is cut, and paths can be copied


def _line(text: str) -> Text:
    """Return a line of the tree; a path in it can neither steer the terminal nor be taken for markup."""
    return Text(visible(text))


def _add_record(tree: Tree, record: Mapping[str, Any]) -> None:
    """Put what made a directory under its name, and under that what it was made from."""
    details: Mapping[str, Any] = record.get("details") or {}
    start, version = details.get("start"), (record.get("versions") or {}).get("llava_ft")
    heading = [str(record.get("action"))]
    heading += [f"adapter_mode {start.get('mode')}"] if start else []
    heading += [f"step {details['step']}"] if "step" in details else []
    heading.append(str(record.get("time")))
    heading += [f"llava_ft {version}"] if version else []
    heading += [f"git {record['git_commit']}"] if record.get("git_commit") else []
    made = tree.add(_line(", ".join(heading)))
    for resumption in details.get("resumptions") or ():
        made.add(_line(f"resumed from {resumption.get('from')} ({resumption.get('time')})"))
    for problem in details.get("ignored") or ():
        made.add(_line(f"ignored: {problem}"))
    for source in record.get("data") or ():
        facts = [f"{source.get('num_usable')} of {source.get('num_records')} records used", str(source.get("use"))]
        facts += [f"weight {source['weight']:g}"] if source.get("weight") is not None else []
        facts += [f"{source['num_taken']} an epoch"] if source.get("num_taken") is not None else []
        made.add(_line(f"data {source.get('path')} ({', '.join([*facts, _short(source.get('fingerprint'))])})"))
    if record.get("base") is not None:
        _add_ancestor(made, "base", record["base"])
    for parent in record.get("parents") or ():
        _add_ancestor(made, "from", parent)


def _add_ancestor(tree: Tree, role: str, entry: Mapping[str, Any]) -> None:
    path = str(entry.get("path"))
    facts = [str(entry[key]) for key in ("kind", "role") if entry.get(key)] + [_short(entry.get("fingerprint"))]
    facts += ["not there any more"] if Path(path).is_absolute() and not Path(path).exists() else []
    branch = tree.add(_line(f"{role} {path} ({', '.join(fact for fact in facts if fact)})"))
    if entry.get("left_out"):
        branch.add(_line(str(entry["left_out"])))
    if entry.get("lineage") is not None:
        _add_record(branch, entry["lineage"])
    if entry.get("base") is not None:
        _add_ancestor(branch, "base", entry["base"])


def _short(fingerprint: object) -> str:
    """Leave the scheme and 12 digits of a fingerprint, enough to tell two apart."""
    scheme, colon, digits = str(fingerprint or "").rpartition(":")
    return scheme + colon + digits[:12]
