"""Records tokenised once and kept: by as many processes as there are cores, for all ranks and runs of a machine.

What is kept is independent of the length limit, the vision tower and the images (`tokenized_rows.py`), so a change of
these takes no new preparation. `docs/reference/preparation.md` says what does.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import tokenizers

from llava_ft.data.preparation.build_once import open_or_build
from llava_ft.data.preparation.processes import Progress, num_cores, run_tasks
from llava_ft.data.preparation.tokenized_rows import TokenizedRows, write_manifest, write_rows
from llava_ft.data.records import parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.tokenize import SampleTokenizer, TokenizedSample
from llava_ft.errors import BadSampleError, UserError

logger = logging.getLogger(__name__)

RECORDS_FOR_PROCESSES: Final = 2_000
"""Fewer records are tokenised in the process itself: starting others takes longer."""

_MIN_SHARD: Final = 500
_MAX_SHARD: Final = 2_000
"""Records of a part at most: progress is counted by parts, and a run that is stopped waits for those under way."""
_SHARDS_PER_PROCESS: Final = 4

_PACKAGE: Final = Path(__file__).parents[2]
_DECIDING: Final = (
    "conversation.py",
    "data/preparation/tokenized_rows.py",
    "data/records.py",
    "data/sources/*.py",
    "data/tokenize.py",
)
"""Modules that decide what is in a row."""


@dataclass(frozen=True, slots=True)
class PreparationSettings:
    """How records are prepared."""

    cache_dir: Path | None = None  # where what was prepared is kept; None means beside the caches of `datasets`
    num_processes: int | None = None  # None means one for each core
    goes_first: bool = True  # whether this process begins at once, or lets another one of its machine go first

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise UserError(
                f"preprocessing_num_workers is {self.num_processes}; it must be at least 1. Leave it out for one "
                "process on each core."
            )

    @property
    def directory(self) -> Path:
        """Where what was prepared is kept."""
        if self.cache_dir is not None:
            return Path(self.cache_dir)
        from datasets import config  # takes half a second  # pyright: ignore[reportMissingTypeStubs]

        return Path(config.HF_DATASETS_CACHE) / "llava_ft"

    @property
    def processes(self) -> int:
        """Processes that may work at once."""
        return self.num_processes or num_cores()


def prepare_rows(
    source: RecordSource, tokenize: SampleTokenizer, settings: PreparationSettings, *, prompt_prefix: str = ""
) -> TokenizedRows:
    """Tokenise the records of a source, its prefix before each first question, or open what was tokenised before.

    Raises:
        UserError: The source cannot be read, or the cache cannot be written.
        RunError: The disk is full, or a process was killed.
    """
    # Calls of the tokenizer set these two; they do not change the ids of a text.
    backend: dict[str, Any] = json.loads(tokenize.tokenizer.backend_tokenizer.to_str())
    state = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
    begin = tokenize.tokenizer("")["input_ids"]
    # Everything that a row depends on; the name of the directory changes with it.
    depends_on = {
        "source_fingerprint": source.fingerprint(),
        "template": repr(tokenize.template),
        "tokenizer": _digest(json.dumps([tokenizers.__version__, begin, state], sort_keys=True).encode()),
        "supervise": tokenize.supervise,
        "mm_use_im_start_end": str(tokenize.mm_use_im_start_end),
        "prompt_prefix": prompt_prefix,
        "program": _program_fingerprint(),
    }
    directory = settings.directory / "tokens" / _digest(json.dumps(depends_on, sort_keys=True).encode())
    was_built = False

    def build(empty: Path) -> None:
        nonlocal was_built
        was_built = True
        processes = settings.processes if len(source) >= RECORDS_FOR_PROCESSES else 1
        # Small enough parts that no process waits long for the last one.
        size = math.ceil(len(source) / (_SHARDS_PER_PROCESS * processes))
        size = min(max(size, _MIN_SHARD), _MAX_SHARD)
        parts = [range(start, min(start + size, len(source))) for start in range(0, len(source), size)]
        work = partial(_tokenize_part, source, tokenize, prompt_prefix, empty)
        files: list[Path] = []
        with Progress(f"Tokenising {source.name}", len(source), "records") as progress:
            for part, file in zip(parts, run_tasks(work, parts, processes), strict=True):
                files.append(file)
                progress.advance(len(part))
        write_manifest(empty, files, {"source": source.name, **depends_on})
        logger.info(
            "Tokenised %d records of %s in %.1f s (%.0f a second). They are kept in %s.",
            len(source), source.name, progress.seconds, progress.rate, directory,
        )  # fmt: skip

    rows = open_or_build(directory, TokenizedRows, build, goes_first=settings.goes_first)
    if not was_built:
        logger.info("The records of %s were tokenised before: %s.", source.name, directory)
    return rows


def _tokenize_part(source: RecordSource, tokenize: SampleTokenizer, prefix: str, directory: Path, part: range) -> Path:
    """Tokenise some records into a file: the work of one process."""

    def rows() -> Iterator[TokenizedSample | BadSampleError]:
        for index, record in zip(part, source.read(part.start, part.stop), strict=True):
            try:
                yield tokenize(parse_record(record, index, prefix))
            except BadSampleError as error:
                yield error

    path = directory / f"records-{part.start:09d}.arrow"
    write_rows(path, rows())
    return path


@cache
def _program_fingerprint() -> str:
    files = [file for pattern in _DECIDING for file in sorted(_PACKAGE.glob(pattern))]
    return _digest(b"".join(file.read_bytes() for file in files))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
