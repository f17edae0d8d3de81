"""From a path to a source of records. What reads one kind of them is imported where it is needed."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from llava_ft.data.sources.base import RecordSource, choose_split
from llava_ft.errors import UserError

_JSON: Final = (".json", ".jsonl", ".ndjson")
_KINDS: Final = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".tar": "tar",
    **dict.fromkeys(_JSON, "json"),
}
_COMPRESSED: Final = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip", ".7z")
MIXTURE_SUFFIXES: Final = (".yaml", ".yml")
_SHARD_NAME: Final = re.compile(r"(.+?)-\d{5}-of-\d{5}(-.*)?\.\w+")
_RANGE: Final = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HUB_NAME: Final = re.compile(
    r"(?P<path>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::(?P<config>[\w.-]+))??(?::(?P<split>[\w.-]+))?"
)
_MAX_SHARDS: Final = 100_000


def open_source(path: str | Path, *, split: str | None = None, image_folder: str | None = None) -> RecordSource:
    """Find out what kind of source a path is; see `docs/reference/data-format.md`. Records are not read yet.

    A split may be part of the path, as in `folder:validation`, or be given beside it.

    Raises:
        UserError: The path is of no known kind, or does not fit `split`.
    """
    name = str(path)
    place = Path(path)
    try:
        if place.is_dir():
            return _open_folder(place, split, image_folder)
        exists = place.exists()
    except OSError as error:
        raise UserError(f"Data file {name} cannot be read: {error.strerror}. Check --data_path.") from None
    if exists:
        return _open_files(name, [place], split, image_folder)
    if files := _expand(name):
        return _open_files(name, files, split, image_folder)
    folder, colon, end = name.rpartition(":")
    if colon and end and Path(folder).is_dir():
        return _open_folder(Path(folder), _one_split(name, end, split), image_folder)
    found = _HUB_NAME.fullmatch(name)
    if found and _is_hub_name(name):
        from llava_ft.data.sources.tables import HubSource

        return HubSource(found["path"], found["config"], _one_split(name, found["split"], split), image_folder)
    raise UserError(f"Data file {name} does not exist. Check --data_path.")


def _one_split(name: str, in_name: str | None, split: str | None) -> str | None:
    if in_name and split and in_name != split:
        raise UserError(f"{name} names a split, and {split!r} is asked for. Give one of the two.")
    return in_name or split


def resolve_source(path: str, folder: Path) -> str:
    """Let a path count from a folder, unless it is absolute or the name of a data set on the hub."""
    place = folder / path
    is_pattern = bool(glob.has_magic(path) or _RANGE.search(path))
    without_split = folder / path.rpartition(":")[0] if ":" in path else place
    is_here = is_pattern or place.exists() or without_split.is_dir()
    return str(place) if is_here or not _is_hub_name(path) else path


def _is_hub_name(path: str) -> bool:
    suffix = Path(path).suffix.lower()
    return bool(_HUB_NAME.fullmatch(path)) and suffix not in (*_KINDS, *_COMPRESSED, *MIXTURE_SUFFIXES)


def _open_files(name: str, files: Sequence[Path], split: str | None, image_folder: str | None) -> RecordSource:
    """Open one file, or several of one kind."""
    suffixes = {file.suffix.lower() for file in files}
    kinds = {_KINDS.get(suffix, "json") for suffix in suffixes}
    if compressed := suffixes & {*_COMPRESSED}:
        raise UserError(
            f"Data file {name} is compressed ({min(compressed)}), and records are read from anywhere in a file. "
            "Unpack it first; images in tar shards are compressed as they are."
        )
    if suffixes & {*MIXTURE_SUFFIXES}:
        raise UserError(f"{name} is a mixture. A mixture cannot be part of another; write its sources there.")
    if len(kinds) > 1:
        raise UserError(f"{name} stands for files of several kinds ({', '.join(sorted(suffixes))}). Name one kind.")
    if split:
        raise UserError(f"{name} has no splits, but {split!r} is asked for. Leave it out.")
    kind = kinds.pop()
    if kind == "json":
        from llava_ft.data.sources.json_files import JsonSource

        return JsonSource(str(files[0]) if len(files) == 1 else name, files, image_folder)
    if kind == "tar":
        from llava_ft.data.sources.tar_shards import TarSource

        return TarSource(name, files, image_folder)
    from llava_ft.data.sources.tables import ShardsSource

    return ShardsSource(name, files, image_folder)


def _open_folder(folder: Path, split: str | None, image_folder: str | None) -> RecordSource:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        from llava_ft.data.sources.tables import SavedSource

        return SavedSource(folder, split, image_folder)
    files = _shards_in(folder) or _shards_in(folder / "data")
    if not files:
        raise UserError(
            f"Data file {folder} is a folder. Give the .json or .jsonl file itself (--data_path). A folder has to hold "
            ".parquet, .arrow or .tar files, or a data set that was saved with save_to_disk."
        )
    splits = {found[1] if (found := _SHARD_NAME.fullmatch(file.name)) else "" for file in files}
    if (len(splits) > 1 and "" not in splits) or (split and splits != {""}):
        chosen = choose_split(sorted(splits), split, str(folder))
        files = [file for file in files if file.name.startswith(f"{chosen}-")]
        split = None
    return _open_files(str(folder), files, split, image_folder)


def _shards_in(folder: Path) -> list[Path]:
    suffixes = [suffix for suffix, kind in _KINDS.items() if kind != "json"]
    return sorted(file for file in folder.glob("*") if file.suffix in suffixes and not file.name.startswith("."))


def _expand(name: str) -> list[Path]:
    """Find the files that a pattern stands for, by name; none for a text without a pattern.

    Raises:
        UserError: The pattern is too wide, matches nothing, or names a file that is missing.
    """
    names = _expand_ranges(name)
    if not any(map(glob.has_magic, names)):
        if not _RANGE.search(name):
            return []
        missing = [each for each in names if not Path(each).is_file()]
        if missing:
            raise UserError(
                f"{name} stands for {len(names)} files, and {len(missing)} of them do not exist; the first is "
                f"{missing[0]}. Check the range."
            )
        return [Path(each) for each in names]
    found = (Path(found) for each in names for found in glob.glob(each, recursive=True))
    files = sorted({file for file in found if file.is_file()})
    if not files:
        raise UserError(f"{name} matches no file. Check --data_path.")
    return files


def _expand_ranges(name: str) -> list[str]:
    found = _RANGE.search(name)
    if not found:
        return [name]
    first, last = int(found[1]), int(found[2])
    if first > last or last - first >= _MAX_SHARDS:
        raise UserError(f"{name}: the range {found[0]} has to go upwards, over at most {_MAX_SHARDS} numbers.")
    width = len(found[1])
    starts = [f"{name[: found.start()]}{number:0{width}d}" for number in range(first, last + 1)]
    ends = _expand_ranges(name[found.end() :])
    if len(starts) * len(ends) > _MAX_SHARDS:
        raise UserError(f"{name} stands for {len(starts) * len(ends)} files; at most {_MAX_SHARDS} can be read.")
    return [start + end for start in starts for end in ends]
