"""The shipped tiny LLaVA knows shapes and letters but no digits, and the quick start teaches it those."""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ft.args import parse_args
from llava_ft.conversation import get_template
from llava_ft.inference.dialogue import Picture
from llava_ft.inference.generate import build_prompt
from llava_ft.inference.load import load_model
from llava_ft.inference.responder import Responder, Sampling

REPO = Path(__file__).parents[1]
MODEL = REPO / "data" / "tiny-llava"
SECONDS_ALLOWED = 500


@pytest.fixture
def scripts(monkeypatch):
    """Make the scripts importable by their names."""
    monkeypatch.syspath_prepend(str(REPO / "scripts"))


def test_the_recipe_names_the_shipped_model():
    args = parse_args(["--config", "quickstart.yaml"])
    assert (REPO / args.model.model_name_or_path).resolve() == MODEL
    assert args.flags.lora_enable
    assert args.notes == []


def test_the_shipped_files_are_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 5_000_000


@pytest.mark.slow
def test_answers_about_drawn_pictures(scripts, tmp_path):
    import make_tiny_llava

    loaded = load_model(str(MODEL))
    template = get_template(loaded.template)
    rng = random.Random(99)
    right = asked = 0
    for number in range(20):
        picture = make_tiny_llava.draw(rng)
        file = tmp_path / f"{number}.png"
        picture.image.save(file)
        for question, expected in picture.talk[:2]:
            prompt = build_prompt(question, 1, template)
            pictures = [Picture.read(str(file))]
            answer = Responder(loaded).answer(prompt, pictures, template, Sampling(max_new_tokens=16)).text
            assert answer.endswith(".")
            right += answer == expected
            asked += 1
    assert right >= 0.6 * asked


@pytest.mark.slow
@pytest.mark.timeout(SECONDS_ALLOWED + 60)
def test_a_quarter_of_the_quick_start(scripts, tmp_path):
    """The whole way with 3 epochs of 12: it learns, and the script says that this is not enough (55% measured)."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("sklearn")
    result = subprocess.run(
        [REPO / "scripts" / "quickstart.sh", tmp_path, "--num_train_epochs", "3"],
        env=os.environ | {"QUICKSTART_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=SECONDS_ALLOWED,
    )
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Expected below 30% before and at least 90% after." in result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["accuracy_before"] < 0.3
    assert 0.4 < report["accuracy_after"] < 0.9
    assert report["num_test"] == 100
    assert "Which digit is this?" in result.stdout
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 10
    assert "<polyline" in page
    assert "http" not in page

    import quickstart_report

    data = tmp_path / "digits"
    right = {r["id"]: r["conversations"][1]["value"] for r in quickstart_report.read_records(data, "test")}
    (tmp_path / "after.json").write_text(json.dumps(right))
    files = {"before": tmp_path / "before.json", "after": tmp_path / "after.json"}
    asked = argparse.Namespace(**files, data=data, run=tmp_path / "lora", output=tmp_path)
    assert quickstart_report.compare(asked) == 0
    assert json.loads((tmp_path / "report.json").read_text())["accuracy_after"] == 1

    from quickstart_picture import HEIGHT, WIDTH, draw

    assert draw(tmp_path).size == (WIDTH, HEIGHT)
