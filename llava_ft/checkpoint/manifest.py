"""`llava_ft.json`: what a directory is, what it was made from, and the proof that it is complete.

It is written last. A directory whose manifest is there and whose files have the sizes in it is complete; resuming takes
no other. The digests in it show damage, which a resumed run looks for in all files, and tie the weights of one run
together, so that an adapter cannot be paired by accident with another run's projector.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

from llava_ft.checkpoint.names import (
    ADAPTER_BIN,
    ADAPTER_SAFETENSORS,
    MANIFEST,
    NON_LORA_BIN,
    NON_LORA_SAFETENSORS,
    PROJECTOR_BIN,
    PROJECTOR_SAFETENSORS,
)
from llava_ft.checkpoint.overrides import Force, refuse_unless
from llava_ft.digests import file_digest, file_digests
from llava_ft.errors import CheckpointError
from llava_ft.json_files import read_json
from llava_ft.version import __version__

MERGED_BASE: Final = "merged_base"
"""A base inside the output directory of a run that merged it first: a model of its own, with its own manifest."""

_PAIRED = frozenset(
    (ADAPTER_BIN, ADAPTER_SAFETENSORS, NON_LORA_BIN, NON_LORA_SAFETENSORS, PROJECTOR_BIN, PROJECTOR_SAFETENSORS)
)
"""Trained weights beside frozen ones."""

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "pillow", "tokenizers")


@dataclass
class Manifest:
    """Content of `llava_ft.json`."""

    kind: str  # see `ResultKind`
    base: str = ""
    base_fingerprint: str = ""  # see `language_model_fingerprint`
    step: int = 0
    template: str = ""
    git_commit: str = ""  # of the repository that the run was started in, and whether its files differed
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Size in bytes and digest (`file_digest`) of each file. Earlier versions gave the SHA-256 of some."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    def write(self, directory: Path) -> None:
        """List the directory's files, without sub-checkpoints, and write the manifest, in place at once."""
        found: list[Path] = []
        for entry in directory.iterdir():
            if entry.name.startswith((".", "checkpoint-", "runs", "wandb")) or entry.name == MERGED_BASE:
                continue
            found += [path for path in entry.rglob("*") if path.is_file()] if entry.is_dir() else [entry]
        paths = sorted(path for path in found if path.name != MANIFEST)
        self.files = {
            str(path.relative_to(directory)): {"size": path.stat().st_size, "xxh3_128": digest}
            for path, digest in zip(paths, file_digests(paths), strict=True)
        }
        self.versions = installed_versions()
        write_in_place(directory / MANIFEST, json.dumps(asdict(self), indent=1))


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a directory, or None if it has none, as in checkpoints of the original.

    Raises:
        CheckpointError: It is damaged.
    """
    if not (directory / MANIFEST).is_file():
        return None
    fields = read_json(directory / MANIFEST)
    known = {key: value for key, value in fields.items() if key in Manifest.__dataclass_fields__}
    if "kind" not in known or not isinstance(known.get("files"), dict):
        raise CheckpointError(f"{directory / MANIFEST} is damaged: it does not list the directory's files.")
    for name, described in cast("dict[str, Any]", known["files"]).items():
        if not isinstance(described, dict) or not isinstance(cast("Any", described).get("size"), int):
            raise CheckpointError(f"{directory / MANIFEST} is damaged: it does not say how large {name} is.")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(
                f"{directory / MANIFEST} names {name!r}, which is not in its directory. It was changed."
            )
    return Manifest(**known)


def what_is_incomplete(directory: Path) -> str | None:
    """Say why a checkpoint of this program is incomplete; None if it is complete."""
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return str(error)
    if manifest is None:
        return f"it has no {MANIFEST}, which is written last"
    for name, described in manifest.files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != described["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {described['size']}"
    return None


def check_pairing(directory: Path, *, force: Force = False) -> list[str]:
    """Check that the trained weights in a directory are those that were written together.

    A directory without a manifest has nothing to be checked by. With `force` files of other runs are used as they are.

    Returns:
        What is wrong and was passed over.

    Raises:
        CheckpointError: One of the files is missing, damaged or of another run.
    """
    ignored: list[str] = []
    manifest = read_manifest(directory)
    for name, described in manifest.files.items() if manifest else ():
        path = directory / name
        if path.name not in _PAIRED:
            continue
        if not path.is_file():
            problem = f"{path} is missing, though it was written with this checkpoint."
            ignored.append(refuse_unless(force is True, problem, "Copy it again."))
        elif not is_as_written(path, described):
            problem = f"{path} is not the file that was written with this checkpoint: it is damaged or of another run."
            advice = "Put the right file back, or pass --force to use the files as they are."
            ignored.append(refuse_unless(force is True, problem, advice))
    return ignored


@functools.cache  # reading them takes longer than a small save, and every save asks
def installed_versions() -> Mapping[str, str]:
    """Versions of this program, Python and the packages whose version can change a result."""
    versions = {"llava_ft": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def is_as_written(path: Path, described: Mapping[str, Any]) -> bool:
    """Whether a file has the size and the digest that a manifest gives for it, as far as it gives them."""
    if path.stat().st_size != described["size"]:
        return False
    if "xxh3_128" in described:
        return file_digest(path) == described["xxh3_128"]
    if "sha256" in described:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == described["sha256"]
    return True


def write_in_place(path: Path, text: str) -> None:
    """Write a file that is there whole and on disk, or not at all."""
    staged = path.with_name(f".{path.name}.incomplete")
    staged.write_text(text, encoding="utf-8")
    sync_file(staged)
    os.replace(staged, path)


def sync_file(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
