"""From what `--data_path` says to a source of records."""

from pathlib import Path

from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.json_files import JsonSource


def open_source(path: str | Path, *, image_folder: str | None = None) -> RecordSource:
    """Find out what kind of source a path is. Nothing is read yet.

    Args:
        path: See `docs/data_format.md`.
        image_folder: Folder of the images that the records name by path; None means the run's.
    """
    return JsonSource(path, image_folder)
