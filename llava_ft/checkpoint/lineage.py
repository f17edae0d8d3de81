"""`lineage.json`: what a directory was made from, and what that was made from, back to the first base.

Everything that is written gets one: checkpoints, results, merges, consolidations, exports. It is written before the
manifest, so that the manifest lists it. A parent's own record is copied into it, so the chain can be read when the
parents are gone or have moved; each ancestor is described once, however many ways lead to it.
"""

import hashlib
import json
import logging
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import yaml

from llava_ft.checkpoint.directory import absolute_or_hub_name, base_of_adapter, identify
from llava_ft.checkpoint.fingerprint import language_model_fingerprint, weights_fingerprint
from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.manifest import installed_versions, read_manifest, write_in_place
from llava_ft.checkpoint.names import RUN_CONFIG, native_name
from llava_ft.checkpoint.weights import WeightFiles, read_json
from llava_ft.errors import CheckpointError

logger = logging.getLogger(__name__)

LINEAGE: Final = "lineage.json"
SCHEMA_VERSION: Final = 1
MAX_DEPTH: Final = 32
"""Generations that are copied; a longer chain says so where it ends."""

_SECONDS_FOR_GIT = 10.0
_SECRET = re.compile(r"token$|api_key|password|secret|credential", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class Lineage:
    """Content of `lineage.json`.

    Attributes:
        action: What made the directory: `train`, `merge`, `consolidate`, `export hf` and the like.
        time: When, in UTC.
        base: Path (or name on the hub) and fingerprint of the base's language model, and its own record if it has one.
        data: What was trained on: for each source its path, fingerprint, number of records and, in a mixture, share.
        run_config: The resolved configuration of a run, without secrets, the SHA-256 of its file, and the directory
            that relative paths in it count from; empty otherwise.
        parents: What the weights came from, besides the base: path, kind, fingerprint and the record of each.
        details: What else belongs to the action, such as the step or the resumptions of a run.
        git_commit: Commit that the program was started in, and whether files differed from it; "" if none.
        versions: See `installed_versions`.
        schema_version: Version of this layout.
    """

    action: str
    time: str
    base: Mapping[str, Any] | None = None
    data: Sequence[Mapping[str, Any]] = ()
    run_config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    parents: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    git_commit: str = ""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    schema_version: int = SCHEMA_VERSION


def record_lineage(
    directory: Path,
    action: str,
    *,
    parents: Sequence[Path | Mapping[str, Any]] = (),
    base: tuple[str, str] | None = None,
    data: Sequence[Mapping[str, Any]] = (),
    run_config: str = "",
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write `lineage.json` into a directory, in place at once; call it before the manifest is written.

    Arguments as in `Lineage`, but `parents` are directories, or what `describe_parent` said of them earlier, `base` is
    path or name, and fingerprint, and `run_config` is YAML.

    Raises:
        CheckpointError: A parent is no model directory.
    """
    described = [parent if isinstance(parent, Mapping) else describe_parent(parent) for parent in parents]
    if base is not None:  # with its own record, if a merge or a run of this program wrote it
        record = read_lineage(Path(base[0]))
        named = {"path": absolute_or_hub_name(base[0]), "fingerprint": base[1]}
        described.insert(0, named if record is None else named | {"lineage": asdict(record)})
    ancestors = _each_once(described)
    config = {
        "file": RUN_CONFIG,
        "sha256": hashlib.sha256(run_config.encode()).hexdigest(),
        "working_directory": str(Path.cwd()),
        "values": _without_secrets(yaml.safe_load(run_config)),
    }
    lineage = Lineage(
        action=action,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        base=None if base is None else ancestors[0],
        data=list(data),
        run_config=config if run_config else {},
        parents=ancestors if base is None else ancestors[1:],
        details=dict(details or {}),
        git_commit=str(git_state(Path.cwd()) or ""),
        versions=installed_versions(),
    )
    write_in_place(directory / LINEAGE, json.dumps(asdict(lineage), indent=1, default=str) + "\n")


def read_lineage(directory: Path) -> Lineage | None:
    """Return the record of a directory, or None if it has none, as in directories of other programs.

    Raises:
        CheckpointError: It is damaged, or of a later version of this program.
    """
    file = directory / LINEAGE
    if not file.is_file():
        return None
    fields = read_json(file)
    version = fields.get("schema_version")
    if not isinstance(version, int) or not isinstance(fields.get("action"), str):
        raise CheckpointError(f"{file} is damaged: it does not say what made the directory. Copy it again.")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{file} has version {version} of its layout; this program reads up to {SCHEMA_VERSION}. Use a newer one."
        )
    return Lineage(**{key: value for key, value in fields.items() if key in Lineage.__dataclass_fields__})


def describe_parent(path: Path) -> dict[str, Any]:
    """Describe a directory or file that weights came from: path, kind, fingerprint, base, and its own record.

    A directory without weights that can be fingerprinted, such as DeepSpeed's shards alone, has an empty one.
    """
    described: dict[str, Any] = {"path": str(path.resolve())}
    if path.is_file():
        described |= {"kind": "file", "fingerprint": weights_fingerprint([WeightFiles.open(path)])}
        manifest = read_manifest(path.parent)
        record = read_lineage(path.parent) if manifest is not None and path.name in manifest.files else None
        return described | {"lineage": None if record is None else asdict(record)}
    described |= _kind_and_fingerprint(path)
    record = read_lineage(path)
    if record is None:  # then its other files say what they know of its base
        manifest = read_manifest(path)
        if manifest is not None and manifest.base:
            described["base"] = {"path": manifest.base, "fingerprint": manifest.base_fingerprint}
        elif name := base_of_adapter(path):
            described["base"] = {"path": name, "fingerprint": ""}
    return described | {"lineage": None if record is None else asdict(record)}


@dataclass(frozen=True)
class GitState:
    """The repository around a directory at one moment."""

    commit: str  # full hash
    is_modified: bool  # whether tracked files differ from it
    root: Path

    def __str__(self) -> str:
        """The commit, marked if the files differ from it."""
        return self.commit + (" (modified)" if self.is_modified else "")


@cache
def git_state(directory: Path) -> GitState | None:
    """Read the state of the repository that a directory belongs to; asked once, so that a run reports one state.

    Returns:
        The state, or None if there is no repository, no commit in it, or no usable git.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    root = _git(directory, "rev-parse", "--show-toplevel")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if commit is None or root is None or changes is None:
        return None
    return GitState(commit, bool(changes), Path(root))


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS_FOR_GIT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("git %s in %s: %s", " ".join(arguments), directory, error)
        return None
    return done.stdout.strip()


def _kind_and_fingerprint(path: Path) -> dict[str, str]:
    try:
        directory = identify(path)
    except CheckpointError:
        return {"kind": "files", "fingerprint": ""}
    if directory.kind in ("llava", "language model"):
        source = WeightSource.of("model", WeightFiles.open(path), native_name)
        return {"kind": directory.kind, "fingerprint": language_model_fingerprint([source])}
    adapter = (directory.adapter_file, directory.non_lora_file) if directory.kind == "lora" else ()
    files = [file for file in (*adapter, directory.projector_file) if file is not None]
    places = files if directory.kind in ("lora", "projector") else [path]
    fingerprint = weights_fingerprint([WeightFiles.open(place) for place in places])
    return {"kind": directory.kind, "fingerprint": fingerprint}


def _without_secrets(value: Any) -> Any:
    """Leave out texts whose key names a secret, and user names and passwords in addresses."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {k: _without_secrets(v) for k, v in items if not (isinstance(v, str) and _SECRET.search(str(k)))}
    if isinstance(value, list):
        return [_without_secrets(item) for item in cast("list[Any]", value)]
    return _CREDENTIALS.sub("", value) if isinstance(value, str) else value


def _each_once(parents: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy the records of parents, each ancestor's once and to a bounded depth."""
    seen: set[tuple[str, str]] = set()

    def copy(entry: Mapping[str, Any], depth: int) -> dict[str, Any]:
        copied = dict(entry)
        record = cast("Mapping[str, Any] | None", entry.get("lineage"))
        if record is None:
            return copied
        identity = (str(entry.get("path", "")), str(entry.get("fingerprint", "")))
        if identity in seen or depth == MAX_DEPTH:
            reason = "described above" if identity in seen else f"older than {MAX_DEPTH} generations"
            return copied | {"lineage": None, "left_out": reason}
        seen.add(identity)
        base = cast("Mapping[str, Any] | None", record.get("base"))
        older = cast("Sequence[Mapping[str, Any]]", record.get("parents", ()))
        copied["lineage"] = dict(record) | {
            "base": None if base is None else copy(base, depth + 1),
            "parents": [copy(parent, depth + 1) for parent in older],
        }
        return copied

    return [copy(parent, 1) for parent in parents]
