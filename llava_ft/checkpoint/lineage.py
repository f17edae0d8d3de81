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
from collections.abc import Mapping, Sequence
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
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import CheckpointError
from llava_ft.json_files import read_json

logger = logging.getLogger(__name__)

LINEAGE: Final = "lineage.json"
SCHEMA_VERSION: Final = 1
MAX_DEPTH: Final = 32
"""Generations that are copied; a longer chain says so where it ends."""

_SECONDS_FOR_GIT = 10.0
_SECRET = re.compile(r"token$|api_key|password|secret|credential", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


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

    Args:
        directory: What was made.
        action: What made it: `train`, `merge`, `consolidate`, `export hf` and the like.
        parents: What the weights came from besides the base: directories, or what `describe_parent` said of them
            earlier.
        base: Path or name of the base, and the fingerprint of its language model.
        data: What was trained on, each source.
        run_config: The resolved configuration of a run, as YAML; secrets in it are left out.
        details: What else belongs to the action, such as the step or the resumptions of a run.

    Raises:
        CheckpointError: A parent is no model directory.
    """
    seen: set[tuple[str, str]] = set()
    of_base: dict[str, Any] | None = None
    if base is not None:
        of_base = {"path": absolute_or_hub_name(base[0]), "fingerprint": base[1]}
        if record := read_lineage(Path(base[0])):  # a merge or a run of this program wrote it
            of_base = _with_ancestors_once(of_base | {"lineage": record}, seen)
    described = [parent if isinstance(parent, Mapping) else describe_parent(parent) for parent in parents]
    config = {
        "file": RUN_CONFIG,
        "sha256": hashlib.sha256(run_config.encode()).hexdigest(),
        "working_directory": str(Path.cwd()),
        "values": _without_secrets(yaml.safe_load(run_config)),
    }
    lineage = {
        "action": action,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": of_base,
        "data": data,
        "run_config": config if run_config else {},
        "parents": [_with_ancestors_once(parent, seen) for parent in described],
        "details": details or {},
        "git_commit": git_commit(Path.cwd()),
        "versions": installed_versions(),
        "schema_version": SCHEMA_VERSION,
    }
    write_in_place(directory / LINEAGE, json.dumps(lineage, indent=1, default=str) + "\n")


def read_lineage(directory: Path) -> dict[str, Any] | None:
    """Return the record of a directory, or None if it has none, as in directories of other programs.

    Raises:
        CheckpointError: It is damaged, or of a later version of this program.
    """
    file = directory / LINEAGE
    if not file.is_file():
        return None
    lineage = read_json(file)
    version = lineage.get("schema_version")
    if not isinstance(version, int) or not isinstance(lineage.get("action"), str):
        raise CheckpointError(f"{file} is damaged: it does not say what made the directory. Copy it again.")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{file} has version {version} of its layout; this program reads up to {SCHEMA_VERSION}. Use a newer one."
        )
    return lineage


def describe_parent(path: Path) -> dict[str, Any]:
    """Describe a directory or file that weights came from: path, kind, fingerprint, base, and its own record.

    A directory without weights that can be fingerprinted, such as DeepSpeed's shards alone, has an empty one.
    """
    described: dict[str, Any] = {"path": str(path.resolve())}
    if path.is_file():
        described |= {"kind": "file", "fingerprint": weights_fingerprint([WeightFiles.open(path)])}
        manifest = read_manifest(path.parent)
        is_listed = manifest is not None and path.name in manifest.files
        return described | {"lineage": read_lineage(path.parent) if is_listed else None}
    described |= _kind_and_fingerprint(path)
    record = read_lineage(path)
    if record is None:  # then its other files say what they know of its base
        manifest = read_manifest(path)
        if manifest is not None and manifest.base:
            described["base"] = {"path": manifest.base, "fingerprint": manifest.base_fingerprint}
        elif name := base_of_adapter(path):
            described["base"] = {"path": name, "fingerprint": ""}
    return described | {"lineage": record}


@cache
def git_commit(directory: Path) -> str:
    """Return the commit of the repository that a directory belongs to, with " (modified)" if tracked files differ.

    It is asked once, so that a run reports one state; "" if there is no repository, no commit in it, or no usable git.
    """
    # `describe --dirty` would write the index, which somebody may be committing from.
    command = ("git", "--no-optional-locks", "-C", str(directory), "status", "--porcelain=v2", "--branch")
    try:
        done = subprocess.run(
            (*command, "--untracked-files=no"), capture_output=True, text=True, timeout=_SECONDS_FOR_GIT, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("No commit of %s is known: %s", directory, error)
        return ""
    lines = done.stdout.splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), "(initial)")
    is_modified = any(not line.startswith("#") for line in lines)
    return "" if commit == "(initial)" else commit + " (modified)" * is_modified


def _kind_and_fingerprint(path: Path) -> dict[str, str]:
    try:
        directory = identify(path)
    except CheckpointError:
        return {"kind": "files", "fingerprint": ""}
    if directory.kind in ("llava", "language model"):
        source = WeightSource.of("model", WeightFiles.open(path), native_name)
        return {"kind": directory.kind, "fingerprint": language_model_fingerprint([source])}
    files = {
        "lora": (directory.adapter_file, directory.non_lora_file, directory.projector_file),
        "projector": (directory.projector_file,),
    }.get(directory.kind, (path,))
    fingerprint = weights_fingerprint([WeightFiles.open(file) for file in files if file is not None])
    return {"kind": directory.kind, "fingerprint": fingerprint}


def _without_secrets(value: Any) -> Any:
    """Leave out texts whose key names a secret, and user names and passwords in addresses."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {k: _without_secrets(v) for k, v in items if not (isinstance(v, str) and _SECRET.search(str(k)))}
    if isinstance(value, list):
        return [_without_secrets(item) for item in cast("list[Any]", value)]
    return _CREDENTIALS.sub("", value) if isinstance(value, str) else value


def _with_ancestors_once(entry: Mapping[str, Any], seen: set[tuple[str, str]], depth: int = 1) -> dict[str, Any]:
    """Copy what is said of an ancestor, with its own ancestors: each once, and to a bounded depth."""
    record: Mapping[str, Any] | None = entry.get("lineage")
    if record is None:
        return dict(entry)
    identity = (str(entry.get("path", "")), str(entry.get("fingerprint", "")))
    if identity in seen or depth == MAX_DEPTH:
        reason = "described above" if identity in seen else f"older than {MAX_DEPTH} generations"
        return {**entry, "lineage": None, "left_out": reason}
    seen.add(identity)
    base: Mapping[str, Any] | None = record.get("base")
    older: Sequence[Mapping[str, Any]] = record.get("parents", ())
    return {
        **entry,
        "lineage": {
            **record,
            "base": None if base is None else _with_ancestors_once(base, seen, depth + 1),
            "parents": [_with_ancestors_once(parent, seen, depth + 1) for parent in older],
        },
    }
