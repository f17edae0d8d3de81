"""What is known about images before a run: found once, and looked at again when a file may have changed."""

import os
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.data.images import ImageTransform
from llava_ft.data.preparation import image_facts
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.errors import ImageError, UserError
from llava_ft.geometry import ImageGeometry
from tests.data.conftest import GOLDEN, record

ANYRES = ImageGeometry(
    image_size=56,
    tokens_per_side=4,
    tokens_per_tile=16,
    features_per_tile=16,
    aspect_ratio="anyres",
    merge_type="spatial_unpad",
    grid_pinpoints=((56, 112), (112, 56), (112, 112)),
)


@pytest.fixture
def opened(monkeypatch):
    """Names of the images whose headers are read."""
    seen = []
    check = image_facts.check_image_header

    def note(content, **options):
        seen.append(os.path.basename(options["name"]))
        return check(content, **options)

    monkeypatch.setattr(image_facts, "check_image_header", note)
    return seen


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("wide", (90, 30)), ("tall", (30, 90)), ("square", (40, 40))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    return folder


@pytest.fixture
def start(build, pictures, tmp_path):
    """Build the data set of three images as another start of the same run."""

    def run(names=("wide", "tall", "square"), **options):
        options = {
            "image_folder": pictures,
            "on_bad_sample": "skip",
            "preparation": PreparationSettings(tmp_path / "cache"),
        } | options
        return build([record(name, image=f"{name}.png") for name in names], **options)

    return run


class TestSecondStart:
    def test_opens_nothing(self, start, opened):
        assert start().report.num_usable == 3
        assert sorted(opened) == ["square.png", "tall.png", "wide.png"]
        opened.clear()
        assert start().report.num_usable == 3
        assert not opened

    def test_other_records_of_the_same_folder_open_only_what_is_new(self, start, opened):
        start(["wide"])
        opened.clear()
        start(["wide", "tall"])
        assert opened == ["tall.png"]

    def test_an_image_that_came_is_used(self, start, pictures):
        shutil.move(pictures / "tall.png", pictures / "elsewhere.png")
        assert start().report.ids_by_kind == {"image-missing": ["tall"]}
        shutil.move(pictures / "elsewhere.png", pictures / "tall.png")
        assert start().report.num_usable == 3

    @pytest.mark.parametrize("level", ["exists", "header", "decode"])
    def test_an_image_that_went_is_noticed(self, start, pictures, level):
        start(check_images=level)
        (pictures / "tall.png").unlink()
        assert start(check_images=level).report.ids_by_kind == {"image-missing": ["tall"]}
        (pictures / "wide.png").write_bytes(b"")
        assert start(check_images=level).report.counts == {"image-missing": 1, "image-empty": 1}

    def test_an_image_that_changed_is_opened_again(self, start, pictures, opened):
        start()
        opened.clear()
        (pictures / "tall.png").write_text("not a picture")
        assert start().report.ids_by_kind == {"image-corrupt": ["tall"]}
        assert opened == ["tall.png"]

    def test_a_bad_image_is_always_opened_again(self, start, pictures, opened):
        (pictures / "tall.png").write_text("not a picture")
        for _ in range(2):
            opened.clear()
            assert start().report.num_usable == 2
            assert "tall.png" in opened

    def test_more_is_read_when_more_is_asked_for(self, start, opened):
        start(check_images="exists")
        assert not opened
        for level in ("header", "decode"):
            opened.clear()
            start(check_images=level)
            assert len(opened) == 3
        opened.clear()
        start(check_images="header")
        assert not opened

    def test_damaged_findings_are_found_again(self, start, tmp_path, opened, caplog):
        start()
        opened.clear()
        (file,) = (tmp_path / "cache" / "images").glob("*.arrow")
        file.write_bytes(file.read_bytes()[:100])
        assert start().report.num_usable == 3
        assert len(opened) == 3
        assert "is damaged" in caplog.text

    def test_findings_that_cannot_be_kept_do_not_stop_a_run(self, start, monkeypatch, caplog):
        def refuse(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(image_facts.Path, "replace", refuse)
        assert start().report.num_usable == 3
        assert "could not be kept" in caplog.text


class TestProcesses:
    def test_findings_are_those_of_one_process(self, start, pictures, tmp_path, monkeypatch):
        (pictures / "tall.png").write_bytes((pictures / "tall.png").read_bytes()[:60])
        monkeypatch.setattr(image_facts, "FILES_FOR_PROCESSES", {"header": 1, "decode": 1})
        monkeypatch.setattr(image_facts, "_FILES_PER_TASK", 2)
        reports = [
            start(check_images="decode", preparation=PreparationSettings(tmp_path / str(number), number)).report
            for number in (1, 2)
        ]
        assert [str(error) for error in reports[0].errors] == [str(error) for error in reports[1].errors]
        assert reports[0].num_usable == 2


class TestSizes:
    @pytest.fixture
    def anyres(self, start):
        transform = ImageTransform.from_pretrained(GOLDEN / "ckpt" / "clip-tiny", geometry=ANYRES)
        return lambda **options: start(geometry=ANYRES, image_transform=transform, **options)

    @pytest.mark.parametrize("level", ["none", "header"])
    def test_lengths_and_items(self, anyres, level):
        train = anyres(check_images=level).train
        for position, size in enumerate([(90, 30), (30, 90), (40, 40)]):
            item = train[position]
            assert item["image_sizes"].tolist() == [list(size)]
            assert item["image_sizes"].dtype == torch.int64
            assert len(item["pixel_values"]) == ANYRES.num_tiles(size)
            assert item["pixel_values"].dtype == torch.uint8
            assert int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == ANYRES.num_tokens(size)
            assert len(item["input_ids"]) == train.lengths[position]
            assert train.image_refs(position)[0].size_wh == size

    def test_several_images_and_truncation(self, build, pictures, tmp_path):
        transform = ImageTransform.from_pretrained(GOLDEN / "ckpt" / "clip-tiny", geometry=ANYRES)
        turns = [
            {"from": "human", "value": "<image>\nOne?"},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "<image> or <image>?"},
            {"from": "gpt", "value": "no"},
        ]
        entry = {"image": ["wide.png", "tall.png", "square.png"], "conversations": turns}
        options = {"geometry": ANYRES, "image_transform": transform, "image_folder": pictures}
        whole = build([entry, record(image="tall.png")], **options).train
        assert whole[0]["image_sizes"].tolist() == [[90, 30], [30, 90], [40, 40]]
        assert whole[1]["image_sizes"].tolist() == [[30, 90]]
        cut = build([entry, record(image="tall.png")], model_max_length=whole.lengths[0] - 1, **options).train
        assert cut[0]["image_sizes"].tolist() == [[90, 30]]
        assert cut[1]["image_sizes"].tolist() == [[30, 90]]
        assert [len(cut[position]["labels"]) for position in (0, 1)] == cut.lengths

    def test_exif(self, anyres, pictures):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (90, 30)).save(pictures / "wide.png", exif=exif)
        assert anyres().train[0]["image_sizes"].tolist() == [[90, 30]]
        assert anyres(exif_transpose=True).train[0]["image_sizes"].tolist() == [[30, 90]]
        assert anyres().train[0]["image_sizes"].tolist() == [[90, 30]]

    @pytest.mark.parametrize("fast", [False, True])
    def test_an_image_that_changes_its_size_during_a_run(self, anyres, pictures, fast):
        train = anyres(fast_decode=fast).train
        Image.new("RGB", (30, 90)).save(pictures / "wide.png")
        item = train[0]
        assert item["bad_sample"].kind == "image-changed"
        assert "is 30 x 90 pixels, but was 90 x 30 before the run" in item["bad_sample"].reason
        assert item["image_sizes"].tolist() == [[90, 30]]
        assert len(item["pixel_values"]) == ANYRES.num_tiles((90, 30))
        assert (item["labels"] == -100).all()

    def test_an_image_that_is_lost_during_a_run(self, anyres, pictures):
        train = anyres().train
        (pictures / "tall.png").unlink()
        item = train[1]
        assert item["bad_sample"].kind == "image-missing"
        assert len(item["pixel_values"]) == ANYRES.num_tiles((30, 90))

    def test_images_that_cannot_be_read_have_no_length(self, anyres, pictures):
        (pictures / "tall.png").unlink()
        assert anyres(check_images="none").report.ids_by_kind == {"image-missing": ["tall"]}


class TestEmbedded:
    @pytest.fixture
    def table(self, tmp_path, pictures):
        rows = [
            {
                "id": name,
                "images": [{"bytes": content, "path": None}],
                "conversations": record(image="x")["conversations"],
            }
            for name, content in (
                ("good", (pictures / "wide.png").read_bytes()),
                ("bad", b"not a picture"),
                ("also good", (pictures / "tall.png").read_bytes()),
            )
        ]
        path = tmp_path / "records.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    def test_are_checked_and_read(self, build, table, transform, pictures, opened):
        datasets = build(table, image_folder=None, on_bad_sample="skip")
        assert datasets.report.ids_by_kind == {"image-corrupt": ["bad"]}
        expected = transform.pixels(Image.open(pictures / "tall.png"))
        assert torch.equal(datasets.train[1]["pixel_values"], expected)
        opened.clear()
        build(table, image_folder=None, on_bad_sample="skip")
        assert len(opened) == 1

    def test_the_bad_one_is_named(self, build, table):
        with pytest.raises(UserError, match=r"Sample 1 \(id 'bad'\): Image '.*records.parquet#1/0' is not an image"):
            build(table, image_folder=None)

    def test_during_a_run(self, build, table):
        train = build(table, image_folder=None, check_images="none").train
        assert train[1]["bad_sample"].kind == "image-corrupt"

    def test_sizes(self, build, table):
        transform = ImageTransform.from_pretrained(GOLDEN / "ckpt" / "clip-tiny", geometry=ANYRES)
        options = {"geometry": ANYRES, "image_transform": transform, "on_bad_sample": "skip"}
        train = build(table, image_folder=None, **options).train
        assert [item["image_sizes"].tolist() for item in train] == [[[90, 30]], [[30, 90]]]


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(ImageError("a.png", "image-missing", "does not exist")))
    assert (error.path, error.kind, str(error)) == ("a.png", "image-missing", "Image 'a.png' does not exist.")
