"""Tokenised records in Arrow files that are mapped into memory: nothing is loaded before it is looked at.

There is one row for each record, also for one that cannot be used, so a row's number is its record's. Rows are facts
about the text alone, with one token for each image: neither the length limit nor the size of an image is in them.

The files are those of the `datasets` library (`Dataset.from_file` opens each). They are read through NumPy views on the
mapped pages, which all processes of a machine share.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow  # pyright: ignore[reportMissingTypeStubs]

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.data.preparation.build_once import NotUsableError
from llava_ft.data.records import Sample
from llava_ft.data.tokenize import TokenizedSample
from llava_ft.errors import BadSampleError

Array = np.ndarray[Any, np.dtype[Any]]

pa: Any = pyarrow
"""The Arrow library; it has no types."""

NUMBER_LISTS: Final = ("input_ids", "target_spans", "answer_ends", "image_positions")
"""Columns that hold lists of int32."""

_MANIFEST: Final = "manifest.json"
_FORMAT: Final = 1
_ROWS_PER_BATCH: Final = 1_000
_TOKENS_PER_BATCH: Final = 1_000_000


class RowWriter:
    """Writes rows into one file; use it as a context.

    Args:
        path: The file, which is replaced.
    """

    def __init__(self, path: Path):
        # Importing it takes half a second, and whoever only reads rows does without it.
        from datasets import Features, List, Value  # pyright: ignore[reportMissingTypeStubs]
        from datasets.arrow_writer import ArrowWriter  # pyright: ignore[reportMissingTypeStubs]

        text = Value("string")
        numbers: dict[str, Any] = {name: List(Value("int32")) for name in NUMBER_LISTS}
        features: Any = Features(
            {"id": text, **numbers, "images": List(text), "error_kind": text, "error_reason": text}
        )
        self._schema: Any = features.arrow_schema
        self._writer: Any = ArrowWriter(path=str(path), features=features)
        self._rows: list[dict[str, object]] = []
        self._num_tokens = 0

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self._flush()
            self._writer.finalize()
        else:
            self._writer.close()

    def add(self, sample: Sample, tokens: TokenizedSample) -> None:
        """Add a record that could be tokenised."""
        input_ids = np.asarray(tokens.input_ids, dtype=np.int32)
        self._add(
            id=_storable(sample.id),
            input_ids=input_ids,
            target_spans=target_spans(tokens.labels),
            answer_ends=tokens.answer_ends,
            image_positions=image_positions(input_ids),
            images=sample.images,
        )
        self._num_tokens += len(input_ids)

    def add_error(self, error: BadSampleError) -> None:
        """Add a record that cannot be used."""
        nothing = dict.fromkeys((*NUMBER_LISTS, "images"), ())
        self._add(id=_storable(error.sample_id), error_kind=error.kind, error_reason=_storable(error.reason), **nothing)

    def _add(self, **row: object) -> None:
        self._rows.append(row)
        if len(self._rows) >= _ROWS_PER_BATCH or self._num_tokens >= _TOKENS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array([row.get(field.name) for row in self._rows], field.type) for field in self._schema]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), _ROWS_PER_BATCH)
        self._rows, self._num_tokens = [], 0


def target_spans(labels: list[int]) -> Array:
    """List start and end of each supervised stretch, one after the other; `spans_of` pairs them."""
    is_target = np.asarray(labels) != IGNORE_INDEX
    return np.flatnonzero(np.diff(is_target, prepend=False, append=False)).astype(np.int32)


def image_positions(input_ids: list[int] | Array) -> Array:
    """List the positions of images."""
    return np.flatnonzero(np.asarray(input_ids) == IMAGE_TOKEN_INDEX).astype(np.int32)


def _storable(text: str) -> str:
    """Replace half characters (lone surrogates), which UTF-8 has no place for."""
    return text.encode("utf-8", "replace").decode("utf-8")


def write_manifest(directory: Path, files: Iterable[Path], made_from: dict[str, str]) -> None:
    """Note what belongs to a finished directory; without this note it is not one.

    Args:
        directory: Where the files are.
        files: Files of rows, in order.
        made_from: What the rows depend on, for people who look.
    """
    listed: list[dict[str, Any]] = []
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        listed.append({"name": file.name, "bytes": file.stat().st_size})
    content = {"format": _FORMAT, "made_from": made_from, "files": listed}
    path = directory / _MANIFEST
    with path.open("w", encoding="utf-8") as manifest:
        json.dump(content, manifest, indent=1)
        manifest.flush()
        os.fsync(manifest.fileno())


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows that lie together in a file, as views."""

    first: int
    table: Any
    values: dict[str, Array]
    ends: dict[str, Array]


class TokenizedRows:
    """Rows on disk. Pickling gives the place, not the content.

    Args:
        directory: What `write_manifest` finished.

    Attributes:
        directory: Where the rows are.

    Raises:
        NotUsableError: Something is missing or not as it was written.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._batches: list[_Batch] = []
        try:
            manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != _FORMAT:
                raise NotUsableError(f"its format is {manifest['format']}, not {_FORMAT}")
            for file in manifest["files"]:
                self._open(directory / file["name"], int(file["bytes"]))
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise NotUsableError(f"{type(error).__name__}: {error}") from None
        self._firsts = np.array([batch.first for batch in self._batches], dtype=np.int64)

    def _open(self, path: Path, num_bytes: int) -> None:
        size = path.stat().st_size
        if size != num_bytes:
            raise NotUsableError(f"{path.name} has {size} bytes instead of {num_bytes}")
        with pa.memory_map(str(path), "r") as mapped, pa.ipc.open_stream(mapped) as reader:
            for table in reader:
                batch = _Batch(len(self), table, {}, {})
                for name in NUMBER_LISTS:
                    column: Any = table.column(name)
                    batch.values[name] = values = column.values.to_numpy(zero_copy_only=True)
                    batch.ends[name] = ends = column.offsets.to_numpy(zero_copy_only=True)
                    if np.any(np.diff(ends) < 0) or ends[0] < 0 or ends[-1] > len(values):
                        raise NotUsableError(f"column {name} is inconsistent")
                self._batches.append(batch)

    def __len__(self) -> int:
        return self._batches[-1].first + self._batches[-1].table.num_rows if self._batches else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenizedRows, (self.directory,))

    def _find(self, row: int) -> tuple[_Batch, int]:
        row = range(len(self))[row]
        batch = self._batches[int(np.searchsorted(self._firsts, row, side="right")) - 1]
        return batch, row - batch.first

    def numbers(self, name: str, row: int) -> Array:
        """Give a row's entry of one of `NUMBER_LISTS`, int32, as a view."""
        batch, local = self._find(row)
        ends = batch.ends[name]
        return batch.values[name][ends[local] : ends[local + 1]]

    def sample_id(self, row: int) -> str:
        """Give the record's own id, "" where there is none."""
        batch, local = self._find(row)
        return str(batch.table.column("id")[local].as_py())

    def images(self, row: int) -> list[str]:
        """Give the images of a record, as it names them."""
        batch, local = self._find(row)
        return list(batch.table.column("images")[local].as_py())

    def counts(self, name: str) -> Array:
        """Give the number of entries of each row's list, `(rows,)` int64, for one of `NUMBER_LISTS`."""
        return _join([np.diff(batch.ends[name]) for batch in self._batches])

    def joined(self, name: str) -> Array:
        """Give the lists of all rows of one of `NUMBER_LISTS` in a row, `(entries,)` int64. It is a copy."""
        return _join([batch.values[name][batch.ends[name][0] : batch.ends[name][-1]] for batch in self._batches])

    def numbered_images(self) -> tuple[Array, list[str]]:
        """Number the different images of all rows.

        Returns:
            The image of each entry of `image_positions`, `(entries,)` int64, and what each number stands for, in the
            order in which they first occur.
        """
        if not self._batches:
            return np.zeros(0, dtype=np.int64), []
        # In one piece: the dictionaries of many pieces would have to be brought together, which takes minutes.
        names = pa.concat_arrays([batch.table.column("images").flatten() for batch in self._batches])
        encoded = names.cast(pa.large_string()).dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()

    def errors(self) -> dict[int, tuple[str, str]]:
        """Give kind and reason of each record that cannot be used, by row, in order."""
        found: dict[int, tuple[str, str]] = {}
        for batch in self._batches:
            kinds, reasons = batch.table.column("error_kind"), batch.table.column("error_reason")
            if kinds.null_count < len(kinds):
                for row in np.flatnonzero(kinds.is_valid().to_numpy(zero_copy_only=False)).tolist():
                    found[batch.first + row] = (str(kinds[row].as_py()), str(reasons[row].as_py()))
        return found


def _join(parts: list[Array]) -> Array:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64, copy=False)


def spans_of(flat: Array) -> list[tuple[int, int]]:
    """Give starts and ends of an entry of `target_spans` in pairs."""
    numbers: list[int] = flat.tolist()
    return list(zip(numbers[::2], numbers[1::2], strict=True))
