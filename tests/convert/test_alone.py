"""An exported model in a process in which this package cannot be imported: transformers alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_ft.conversation import get_template
from llava_ft.inference.generate import build_prompt, prepare_inputs
from llava_ft.inference.load import load_model
from tests.conftest import RECORDINGS
from tests.convert.conftest import LORA, export

ALONE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llava_ft", "tests"):
            raise ImportError(name + " is not to be imported here")

sys.meta_path.insert(0, Refuse())
try:
    import llava_ft
except ImportError:
    pass
else:
    sys.exit("llava_ft can be imported")

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

directory, image, question = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
processor = AutoProcessor.from_pretrained(directory)
said = {"wrong": {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}}
for name in ("text", "image"):
    parts = [{"type": "text", "text": question}]
    if name == "image":
        parts.insert(0, {"type": "image", "image": Image.open(image)})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1]:]
    said[name] = {"ids": inputs["input_ids"][0].tolist(), "logits": logits.tolist(), "answer": answer.tolist()}
assert "llava_ft" not in sys.modules
print(json.dumps(said))
"""


@pytest.mark.usefixtures("in_recordings")
@pytest.mark.parametrize(
    "source",
    [
        "ckpt/llava15-tiny",
        pytest.param("ckpt/llava16-tiny-anyres", marks=pytest.mark.slow),
        pytest.param(str(LORA), marks=pytest.mark.slow),
    ],
)
def test_plain_transformers_says_what_we_say(source: str, tmp_path: Path):
    exported = export(Path(source), tmp_path / "hf", "hf", "--no-verify")
    image, question = RECORDINGS / "images/src/landscape.jpg", "What is this?"
    process = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(exported), str(image), question],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    said = json.loads(process.stdout.splitlines()[-1])
    assert said["wrong"] == {}
    ours = load_model(source, dtype=torch.float32, device="cpu")
    for name, files in (("text", []), ("image", [image])):
        inputs = prepare_inputs(ours, build_prompt(question, len(files), get_template("v1")), files)
        with torch.no_grad():
            logits = ours.model(**inputs).logits[0, -1]
            answer = ours.model.generate(**inputs, do_sample=False, max_new_tokens=12)[0].tolist()
        assert said[name]["ids"] == [512 if index < 0 else index for index in inputs["input_ids"][0].tolist()]
        assert (torch.tensor(said[name]["logits"])[: len(logits)] - logits).abs().max() <= 1e-4
        assert said[name]["answer"] == answer
