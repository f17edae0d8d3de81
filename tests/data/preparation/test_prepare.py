"""Records are tokenised once: kept, shared, found again, and made again when they are damaged."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from llava_ft.conversation import get_template
from llava_ft.data.preparation import prepare, tokenized_rows
from llava_ft.data.preparation.prepare import PreparationSettings, prepare_rows
from llava_ft.data.preparation.samples import find_samples
from llava_ft.data.preparation.truncation import Limits, judge
from llava_ft.data.records import parse_record
from llava_ft.data.sources.open import open_source
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.data.tokenizer import add_image_tokens, load_tokenizer
from llava_ft.digests import file_digest
from llava_ft.errors import BadSampleError, RunError, UserError
from tests.data.conftest import GEOMETRY, GOLDEN, TOKENS_PER_IMAGE, record, turns

REPOSITORY = GOLDEN.parents[1]
RECORDS = [
    record("a", image="square.png", answer="a red car"),
    "text",
    record(7, image=["one.png", "two.png"], answer="yes " * 30),
    {"conversations": turns("Hi", "Hello", "And?", "")},
    {"id": "half \ud83d", "conversations": turns("Hi")},
]


def write(path, records=RECORDS):
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def source_of(tmp_path):
    def make(records=RECORDS):
        source = open_source(str(write(tmp_path / "records.json", records)))
        source.prepare(tmp_path / "cache")
        return source

    return make


@pytest.fixture
def settings(tmp_path):
    return PreparationSettings(tmp_path / "cache", 1)


@pytest.fixture
def seen(monkeypatch):
    """Ids of the records that are tokenised."""
    found = []
    call = SampleTokenizer.__call__
    monkeypatch.setattr(
        SampleTokenizer, "__call__", lambda self, sample: (found.append(sample.id), call(self, sample))[1]
    )
    return found


def tokenize_record(tokenize, entry, number):
    try:
        sample = parse_record(entry, number)
        return sample, tokenize(sample), None
    except BadSampleError as error:
        return None, None, error


def judge_record(tokenize, entry, number, limits):
    sample, tokens, error = tokenize_record(tokenize, entry, number)
    if error:
        return None, None, error
    image_tokens = [TOKENS_PER_IMAGE] * len(sample.images)
    try:
        return judge(tokens, image_tokens, Limits(GEOMETRY, 1 << 30)), judge(tokens, image_tokens, limits), None
    except BadSampleError as error:
        return None, None, error


class TestRows:
    def test_hold_what_the_tokenizer_gives(self, source_of, settings, tokenize):
        rows = prepare_rows(source_of(), tokenize, settings)
        assert len(rows) == len(RECORDS)
        errors = rows.errors()
        for number, entry in enumerate(RECORDS):
            sample, tokens, error = tokenize_record(tokenize, entry, number)
            if error:
                assert errors[number] == (error.kind, error.reason)
                assert len(rows.numbers("input_ids", number)) == 0
                continue
            assert number not in errors
            assert rows.numbers("input_ids", number).tolist() == tokens.input_ids
            assert rows.numbers("answer_ends", number).tolist() == tokens.answer_ends
            assert rows.target_spans(number) == tokens.target_spans
            assert rows.numbers("image_positions", number).tolist() == tokens.image_positions
            again = rows.sample(number)
            assert replace(again, images=tuple(again.images)) == tokens
            positions = rows.numbers("image_positions", number)
            assert [tokens.input_ids[position] for position in positions] == [-200] * len(sample.images)
            assert (tokens.id, tokens.images) == (sample.id, sample.images)
        assert [rows.sample_id(number) for number in (1, 2, 3, 4)] == ["", "7", "", "half ?"]

    def test_numbers_are_views_of_the_file(self, source_of, settings, tokenize):
        numbers = prepare_rows(source_of(), tokenize, settings).numbers("input_ids", 0)
        assert numbers.dtype == np.int32
        assert not numbers.flags.owndata
        assert not numbers.flags.writeable

    def test_pickled_as_a_place(self, source_of, settings, tokenize):
        rows = prepare_rows(source_of([record(answer="word " * 500)] * 50), tokenize, settings)
        pickled = pickle.dumps(rows)
        assert len(pickled) < 1000
        assert pickle.loads(pickled).numbers("input_ids", 49).tolist() == rows.numbers("input_ids", 49).tolist()

    def test_other_programs_can_open_the_files(self, source_of, settings, tokenize):
        rows = prepare_rows(source_of(), tokenize, settings)
        (file,) = rows.directory.glob("*.arrow")
        dataset = datasets.Dataset.from_file(str(file))
        assert len(dataset) == len(RECORDS)
        assert dataset[0]["input_ids"] == rows.numbers("input_ids", 0).tolist()
        assert dataset[1]["error_kind"] == "not-an-object"

    def test_images_are_numbered(self, source_of, settings, tokenize):
        names = ["b.png", "a.png", "b.png", "c.png", "a.png"]
        rows = prepare_rows(source_of([record(image=name) for name in names] + [record()]), tokenize, settings)
        numbers, images = rows.numbered_images()
        assert [images[number] for number in numbers] == names
        assert images == ["b.png", "a.png", "c.png"]
        numbers, images = prepare_rows(source_of([record()]), tokenize, settings).numbered_images()
        assert (len(numbers), images) == (0, [])

    def test_batches(self, source_of, settings, tokenize, monkeypatch):
        monkeypatch.setattr("llava_ft.data.preparation.tokenized_rows._ROWS_PER_BATCH", 3)
        rows = prepare_rows(source_of([record(str(n), answer=f"number {n}") for n in range(10)]), tokenize, settings)
        assert [rows.sample_id(number) for number in range(10)] == [str(n) for n in range(10)]
        assert rows.counts("input_ids").tolist() == [len(rows.numbers("input_ids", n)) for n in range(10)]
        assert rows.sample_id(-1) == "9"
        with pytest.raises(IndexError):
            rows.sample_id(10)

    @pytest.mark.parametrize("limit", [20, 40, 60, 80, 2048])
    @pytest.mark.parametrize("policy", ["drop", "truncate"])
    def test_measuring_all_equals_judging_one_by_one(self, source_of, settings, tokenize, limit, policy):
        records = [*RECORDS, *json.loads((GOLDEN / "data" / "mix.json").read_text())]
        limits = Limits(GEOMETRY, limit, policy)
        samples = find_samples(prepare_rows(source_of(records), tokenize, settings), limits)
        found = {error.index: error.kind for error in samples.errors}
        rows = dict(zip(samples.record_indices.tolist(), range(len(samples)), strict=True))
        for number, entry in enumerate(records):
            whole, kept, error = judge_record(tokenize, entry, number, limits)
            if error:
                assert number not in rows
                assert found.get(number, "too-long") == error.kind
                continue
            row = rows[number]
            assert samples.lengths[row] == kept.tokens
            assert samples.num_supervised[row] == kept.supervised
            assert samples.num_images[row] == kept.images
            assert samples.cuts[row] == kept.ids
            assert samples.was_truncated[row] == (kept.tokens < whole.tokens)
            assert (samples.full_lengths[number], samples.full_supervised[number]) == (whole.tokens, whole.supervised)


class TestOnce:
    def test_the_modules_that_decide_what_is_in_a_row_are_there(self):
        assert all(any(prepare._PACKAGE.glob(pattern)) for pattern in prepare._DECIDING)

    def test_a_second_start_tokenises_nothing(self, source_of, settings, tokenize, seen, caplog):
        caplog.set_level(logging.INFO)
        first = prepare_rows(source_of(), tokenize, settings)
        assert seen
        assert "were tokenised before" not in caplog.text
        seen.clear()
        assert prepare_rows(source_of(), tokenize, settings).directory == first.directory
        assert not seen
        assert f"were tokenised before: {first.directory}" in caplog.text

    def test_lengths_and_policies_take_no_new_preparation(self, build, seen, tmp_path):
        options = {"preparation": PreparationSettings(tmp_path / "cache")}
        build([record(answer="word " * 50)], **options)
        seen.clear()
        build([record(answer="word " * 50)], model_max_length=60, **options)
        build([record(answer="word " * 50)], truncation="drop", on_bad_sample="skip", exif_transpose=True, **options)
        assert not seen

    def test_what_matters_takes_a_new_one(self, source_of, settings, tokenizer, tokenize, tmp_path):
        with_tokens = load_tokenizer(GOLDEN / "tokenizers" / "tiny512")
        add_image_tokens(with_tokens, mm_use_im_start_end=True, mm_use_im_patch_token=False)
        plain = get_template("v1")
        made = [
            prepare_rows(source_of(), tokenize, settings),
            prepare_rows(source_of(RECORDS[:2]), tokenize, settings),
            prepare_rows(source_of(), SampleTokenizer(tokenizer, get_template("llama_2")), settings),
            prepare_rows(source_of(), SampleTokenizer(tokenizer, plain, supervise="all"), settings),
            prepare_rows(source_of(), SampleTokenizer(with_tokens, plain), settings),
            prepare_rows(source_of(), SampleTokenizer(with_tokens, plain, mm_use_im_start_end=True), settings),
            prepare_rows(source_of(), tokenize, settings, prompt_prefix="Look. "),
        ]
        assert len({rows.directory for rows in made}) == len(made)

    def test_a_tokenizer_that_was_used_is_the_same(self, source_of, settings):
        directories = []
        for text in ("", "Some text"):
            tokenizer = load_tokenizer(GOLDEN / "tokenizers" / "tiny512")
            tokenizer([text, "More"], padding=True, truncation=True, max_length=4)
            rows = prepare_rows(source_of(), SampleTokenizer(tokenizer, get_template("v1")), settings)
            directories.append(rows.directory)
        assert directories[0] == directories[1]

    def test_a_copy_of_the_file_is_the_same(self, tokenize, settings, tmp_path, seen):
        sources = [open_source(str(write(tmp_path / f"{name}.json"))) for name in "ab"]
        for source in sources:
            source.prepare(settings.directory)
        prepare_rows(sources[0], tokenize, settings)
        seen.clear()
        prepare_rows(sources[1], tokenize, settings)
        assert not seen

    def test_default_place(self):
        assert PreparationSettings().directory == Path(os.environ["HF_DATASETS_CACHE"]) / "llava_ft"

    @pytest.mark.parametrize("number", [0, -1])
    def test_number_of_processes(self, number):
        with pytest.raises(UserError, match=rf"preprocessing_num_workers is {number}; it must be at least 1"):
            PreparationSettings(num_processes=number)

    def test_a_place_that_cannot_be_written_to(self, source_of, tokenize, tmp_path):
        source = source_of()
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"cannot be written to .*Give a --data_cache_dir"):
            prepare_rows(source, tokenize, PreparationSettings(tmp_path / "file"))


class TestSeveralProcesses:
    @pytest.fixture(autouse=True)
    def _few_records_are_enough(self, monkeypatch):
        monkeypatch.setattr(prepare, "RECORDS_FOR_PROCESSES", 10)
        monkeypatch.setattr(prepare, "_MIN_SHARD", 7)

    def test_the_rows_are_those_of_one_process(self, source_of, tokenize, tmp_path, caplog):
        records = [*(record(str(n), answer=f"number {n}", image=f"{n % 5}.png") for n in range(40)), *RECORDS]
        caplog.set_level(logging.INFO)
        one, two = (
            prepare_rows(source_of(records), tokenize, PreparationSettings(tmp_path / str(number), number))
            for number in (1, 2)
        )
        assert len(list(two.directory.glob("*.arrow"))) == 7
        assert len(one) == len(two) == 45
        for name in ("input_ids", "target_spans", "answer_ends", "image_positions"):
            assert one.joined(name).tolist() == two.joined(name).tolist()
            assert one.counts(name).tolist() == two.counts(name).tolist()
        assert one.errors() == two.errors()
        assert one.numbered_images()[1] == two.numbered_images()[1]
        assert [one.sample_id(n) for n in range(45)] == [two.sample_id(n) for n in range(45)]
        assert "Tokenised 45 records of" in caplog.text

    def test_a_file_that_changes_meanwhile_is_an_error(self, source_of, tokenize, tmp_path):
        source = source_of([record(str(n)) for n in range(20)])
        write(tmp_path / "records.json", [record("changed")] * 30)
        with pytest.raises(UserError, match="changed after it was first read"):
            prepare_rows(source, tokenize, PreparationSettings(tmp_path / "cache", 2))
        assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


class TestDamage:
    @pytest.fixture
    def rows(self, source_of, settings, tokenize):
        return prepare_rows(source_of(), tokenize, settings)

    @pytest.mark.parametrize(
        "damage", ["a token", "shorter", "longer", "gone", "no digests", "half of them", "no manifest", "other format"]
    )
    def test_is_noticed_and_made_good(self, rows, source_of, settings, tokenize, damage, caplog):
        expected = rows.joined("input_ids").tolist()
        file, manifest = next(rows.directory.glob("*.arrow")), rows.directory / "manifest.json"
        digests = rows.directory / "digests.json"
        content = file.read_bytes()
        if damage == "a token":
            token = rows.numbers("input_ids", 0).tobytes()
            file.write_bytes(content.replace(token, token[::-1]))
        elif damage == "shorter":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "longer":
            file.write_bytes(content + content)
        elif damage in ("gone", "no manifest", "no digests"):
            {"gone": file, "no manifest": manifest, "no digests": digests}[damage].unlink()
        elif damage == "half of them":
            digests.write_text(digests.read_text()[:50])
        else:
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 0}))
            names = json.loads(digests.read_text())
            digests.write_text(json.dumps(names | {manifest.name: file_digest(manifest)}))
        again = prepare_rows(source_of(), tokenize, settings)
        assert again.joined("input_ids").tolist() == expected
        assert "is damaged" in caplog.text

    def test_a_full_disk_is_said_and_leaves_nothing(self, source_of, settings, tokenize, monkeypatch):
        open_file = pa.OSFile
        monkeypatch.setattr(tokenized_rows.pa, "OSFile", lambda path, mode: open_file("/dev/full", mode))
        with pytest.raises(RunError, match=r"The disk with .* is full .* --data_cache_dir on another disk"):
            prepare_rows(source_of(), tokenize, settings)
        assert [path.suffix for path in (settings.directory / "tokens").iterdir()] == [".lock"]
        monkeypatch.undo()
        assert len(prepare_rows(source_of(), tokenize, settings)) == len(RECORDS)

    def test_leftovers_of_a_killed_process_are_removed(self, source_of, settings, tokenize):
        rows = prepare_rows(source_of(), tokenize, settings)
        rows.directory.rename(rows.directory.with_name(f".{rows.directory.name}.elsewhere.1"))
        again = prepare_rows(source_of(), tokenize, settings)
        assert sorted(path.name for path in again.directory.parent.iterdir()) == [
            again.directory.name,
            f"{again.directory.name}.lock",
        ]


PREPARE = """
import logging, sys, time
from pathlib import Path
from llava_ft.conversation import get_template
from llava_ft.data.preparation.prepare import PreparationSettings, prepare_rows
from llava_ft.data.preparation import build_once, prepare
from llava_ft.data.sources.open import open_source
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.data.tokenizer import load_tokenizer

logging.basicConfig(filename=sys.argv[6], level=logging.INFO)
place, first, processes, pause = Path(sys.argv[1]), sys.argv[2] == "first", int(sys.argv[3]), float(sys.argv[4])
build_once._SECONDS_AHEAD = 60.0  # on a busy machine the other one is slow to begin
prepare.RECORDS_FOR_PROCESSES = 10
call = SampleTokenizer.__call__

def slowly(self, sample):
    if sample.index == 0:
        (place / f"begun-{'first' if first else 'second'}").touch()
    time.sleep(pause)
    return call(self, sample)

if pause:
    SampleTokenizer.__call__ = slowly
source = open_source(str(place / "records.json"))
source.prepare(place / "cache")
tokenize = SampleTokenizer(load_tokenizer(sys.argv[5]), get_template("v1"))
rows = prepare_rows(source, tokenize, PreparationSettings(place / "cache", processes, first))
print(len(rows))
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that prepares the records of `tmp_path`; none outlives the test."""
    processes = []

    def start(first=True, *, workers=1, pause=0.0):
        arguments = [tmp_path, "first" if first else "second", workers, pause, GOLDEN / "tokenizers" / "tiny512"]
        log = tmp_path / f"{'first' if first else 'second'}.log"
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PREPARE, *map(str, arguments), str(log)],
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class TestSharing:
    def test_one_prepares_and_the_other_waits(self, tmp_path, start):
        write(tmp_path / "records.json", [record(str(n)) for n in range(30)])
        second = start(first=False)
        first = start(pause=0.02)
        assert [process.communicate(timeout=120)[0].strip() for process in (first, second)] == ["30", "30"]
        assert (tmp_path / "begun-first").exists()
        assert not (tmp_path / "begun-second").exists()

    def test_whoever_waits_takes_over_from_the_dead(self, tmp_path, start):
        write(tmp_path / "records.json", [record(str(n)) for n in range(30)])
        first = start(pause=5)
        wait_for((tmp_path / "begun-first").exists)
        second = start(first=False, pause=0.01)
        wait_for((tmp_path / "second.log").exists)
        wait_for(lambda: "Waiting for another process" in (tmp_path / "second.log").read_text())
        first.kill()
        assert second.communicate(timeout=120)[0].strip() == "30"
        tokens = tmp_path / "cache" / "tokens"
        assert len([path for path in tokens.iterdir() if path.is_dir()]) == 1

    def test_killing_it_ends_its_processes_and_leaves_nothing_complete(self, tmp_path, start):
        write(tmp_path / "records.json", [record(str(n)) for n in range(6000)])
        process = start(workers=2)

        def started_by(pid):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return [*children, *(each for child in children for each in started_by(child))]

        wait_for(lambda: list((tmp_path / "cache" / "tokens").glob(".*/*.arrow")) or process.poll() is not None)
        workers = started_by(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(workers) >= 3  # the server and two that it started
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        complete = [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.name[0] != "." and path.is_dir()]
        assert not complete
