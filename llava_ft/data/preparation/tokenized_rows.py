"""Tokenised records in Arrow files that are mapped into memory: nothing is loaded before it is looked at.

There is one row for each record, also for one that cannot be used, so a row's number is its record's. Rows are facts
about the text alone, with one token for each image: neither the length limit nor the size of an image is in them.

`datasets.Dataset.from_file` reads such a file too. All processes of a machine share the mapped pages.
"""

import json
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.compute  # pyright: ignore[reportMissingTypeStubs]

from llava_ft.data.preparation.build_once import NotUsableError
from llava_ft.data.tokenize import Spans, TokenizedSample
from llava_ft.errors import BadSampleError

Array = np.ndarray[Any, np.dtype[Any]]

pa: Any = pyarrow
pc: Any = pyarrow.compute
"""The Arrow library has no types."""

NUMBER_LISTS: Final = ("input_ids", "target_spans", "answer_ends", "image_positions")
"""Columns that hold lists of int32."""

_SCHEMA: Final = pa.schema(
    {
        "id": pa.string(),
        **dict.fromkeys(NUMBER_LISTS, pa.list_(pa.int32())),
        "images": pa.list_(pa.string()),
        "error_kind": pa.string(),
        "error_reason": pa.string(),
    }
)
_MANIFEST: Final = "manifest.json"
_FORMAT: Final = 2
_ROWS_PER_BATCH: Final = 1_000


def write_rows(path: Path, rows: Iterable[TokenizedSample | BadSampleError]) -> None:
    """Write records, or why they cannot be used, into a file, with only some of them in memory at a time."""

    def columns_of(row: TokenizedSample | BadSampleError) -> dict[str, object]:
        if isinstance(row, BadSampleError):
            nothing = dict.fromkeys((*NUMBER_LISTS, "images"), ())
            return {
                "id": storable(row.sample_id), "error_kind": row.kind, "error_reason": storable(row.reason), **nothing
            }  # fmt: skip
        return {
            "id": storable(row.id),
            "input_ids": np.asarray(row.input_ids, dtype=np.int32),
            "target_spans": list(chain.from_iterable(row.target_spans)),
            "answer_ends": row.answer_ends,
            "image_positions": row.image_positions,
            "images": row.images,
        }

    def storable(text: str) -> str:  # UTF-8 has no place for half characters (lone surrogates)
        return text.encode("utf-8", "replace").decode("utf-8")

    remaining = map(columns_of, rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        while batch := list(islice(remaining, _ROWS_PER_BATCH)):
            columns = [pa.array([row.get(field.name) for row in batch], field.type) for field in _SCHEMA]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))


def write_manifest(directory: Path, files: Iterable[Path], made_from: dict[str, str]) -> None:
    """Note the files of rows of a directory, in order, and for people what they depend on."""
    content = {"format": _FORMAT, "made_from": made_from, "files": [file.name for file in files]}
    (directory / _MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


class TokenizedRows:
    """Rows in a directory that `write_manifest` finished. Pickling gives the place, not the content.

    Raises:
        NotUsableError: Something is missing or cannot be read.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        tables: list[Any] = []
        try:
            manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != _FORMAT:
                raise NotUsableError(f"its format is {manifest['format']}, not {_FORMAT}")
            for name in manifest["files"]:
                with pa.memory_map(str(directory / name), "r") as mapped, pa.ipc.open_stream(mapped) as reader:
                    tables.append(reader.read_all())
            self._table = pa.concat_tables(tables)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise NotUsableError(f"{type(error).__name__}: {error}") from None

    def __len__(self) -> int:
        return self._table.num_rows

    def __reduce__(self) -> tuple[Any, ...]:
        return (TokenizedRows, (self.directory,))

    def numbers(self, name: str, row: int) -> Array:
        """Give a row's entry of one of `NUMBER_LISTS`, int32, as a view."""
        return self._table.column(name)[row].values.to_numpy(zero_copy_only=True)

    def target_spans(self, row: int) -> Spans:
        """Give start and end of each supervised stretch of a row's tokens."""
        numbers: list[int] = self.numbers("target_spans", row).tolist()
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def sample(self, row: int) -> TokenizedSample:
        """Give back what `write_rows` was given for a record that can be used."""
        input_ids, ends = (self.numbers(name, row).tolist() for name in ("input_ids", "answer_ends"))
        return TokenizedSample(row, self.sample_id(row), self.images(row), input_ids, self.target_spans(row), ends)

    def sample_id(self, row: int) -> str:
        """Give the record's own id, "" where there is none."""
        return str(self._table.column("id")[row].as_py())

    def images(self, row: int) -> list[str]:
        """Give the images of a record, as it names them."""
        return list(self._table.column("images")[row].as_py())

    def counts(self, name: str) -> Array:
        """Give the number of entries of each row's list, `(rows,)` int64."""
        return pc.list_value_length(self._table.column(name)).to_numpy().astype(np.int64)

    def joined(self, name: str) -> Array:
        """Give the lists of all rows of one of `NUMBER_LISTS` in a row, `(entries,)` int64. It is a copy."""
        return pc.list_flatten(self._table.column(name)).to_numpy().astype(np.int64)

    def numbered_images(self) -> tuple[Array, list[str]]:
        """Number the different images of all rows: `(entries of image_positions,)` int64, and the names numbered.

        The names are in the order in which they first occur.
        """
        # In one piece: the dictionaries of many pieces would have to be brought together, which takes minutes.
        names = pc.list_flatten(self._table.column("images")).cast(pa.large_string()).combine_chunks()
        encoded = names.dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()

    def errors(self) -> dict[int, tuple[str, str]]:
        """Give kind and reason of each record that cannot be used, by row, in order."""
        kinds, reasons = self._table.column("error_kind"), self._table.column("error_reason")
        bad: list[int] = np.flatnonzero(kinds.is_valid().to_numpy()).tolist()
        return dict(
            zip(bad, zip(kinds.drop_null().to_pylist(), reasons.drop_null().to_pylist(), strict=True), strict=True)
        )
