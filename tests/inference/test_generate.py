"""Recorded answers of original LLaVA are given again, from every layout it reads."""

import pytest
import torch

from llava_ft.conversation import get_template
from llava_ft.errors import UserError
from llava_ft.inference.generate import Sampling, build_prompt, generate_answer, prepare_inputs
from llava_ft.inference.load import load_model, load_pretrained_model
from tests.conftest import read_recording

pytestmark = pytest.mark.usefixtures("in_recordings")

LOADS = read_recording("merge/index.json")["loads"]


@pytest.mark.parametrize("name", list(LOADS))
def test_recorded_ids_are_generated(name: str):
    facts = LOADS[name]
    path, base = (
        facts[key] and facts[key].removeprefix("golden/").replace("train/pretrain/", "train/pretrain_vt32/")
        for key in ("model_path", "model_base")
    )
    # The recording was made with weights rounded to float16, computed in float32.
    loaded = load_model(path, base, dtype=torch.float16, vision_tower="ckpt/clip-tiny")
    loaded.model.float()
    assert loaded.context_len == facts["context_len"]
    for case in facts["generate_fp32"]:
        images = [f"images/src/{image}" for image in case["images"] or []]
        inputs = prepare_inputs(loaded, case["prompt"], images)
        ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=len(case["new_ids"]) - 1)
        assert [1, *ids[0].tolist()] == case["new_ids"]


def test_the_original_s_signature():
    tokenizer, model, image_processor, context_len = load_pretrained_model("ckpt/llava15-tiny")
    assert len(tokenizer) == 512
    assert model.dtype == torch.float32
    assert image_processor is not None
    assert context_len == 2048


def test_tiled_images_are_answered_about_alone_and_together():
    loaded = load_model("ckpt/llava16-tiny-anyres")
    files = ["images/src/panorama.png", "images/src/square.png"]
    inputs = prepare_inputs(loaded, "<image> <image>\nWhat?", files)
    assert inputs["image_sizes"].tolist() == [[1000, 75], [224, 224]]
    assert inputs["pixel_values"].shape == (4 + 5, 3, 56, 56)
    geometry = loaded.model.config.image_geometry
    assert int((inputs["input_ids"] < 0).sum()) == geometry.num_tokens((1000, 75)) + geometry.num_tokens((224, 224))
    sampling = Sampling(max_new_tokens=4)
    assert isinstance(generate_answer(loaded, "<image> <image>\nWhat?", files, get_template("v1"), sampling), str)


def test_one_placeholder_for_each_image():
    template = get_template("v1")
    assert build_prompt("What?", 2, template).count("<image>\n") == 2
    assert "see <image>?" in build_prompt("Do you see <image>?", 1, template)
    wrapped = build_prompt("What?", 1, template, mm_use_im_start_end=True)
    assert "<im_start><image><im_end>\nWhat?" in wrapped
    with pytest.raises(UserError, match="has 1 <image> but 2 images are given"):
        build_prompt("<image> What?", 2, template)


def test_a_streamed_answer_is_the_answer():
    class Collect:
        def __init__(self):
            self.ids: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            pass

    loaded = load_model("ckpt/llava15-tiny")
    template = get_template("v1")
    prompt = build_prompt("What is it?", 1, template)
    streamer = Collect()
    sampling = Sampling(max_new_tokens=12)
    answer = generate_answer(loaded, prompt, ["images/src/landscape.jpg"], template, sampling, streamer)
    assert loaded.tokenizer.decode(streamer.ids, skip_special_tokens=True).strip() == answer


def test_generation_ends_at_the_template_s_mark():
    loaded = load_model("ckpt/llava15-tiny")
    template = get_template("v0")
    free = generate_answer(loaded, "Hello", [], get_template("v1"), Sampling(max_new_tokens=12))
    assert template.stop_strings == ("###",)
    stopped = generate_answer(loaded, "Hello", [], template, Sampling(max_new_tokens=12))
    assert stopped == free.split("###")[0].strip()


def test_what_cannot_be_answered_is_refused():
    loaded = load_model("ckpt/llava15-tiny")
    with pytest.raises(UserError, match="but the model's context is 2048"):
        prepare_inputs(loaded, "word " * 3000, [])
    with pytest.raises(UserError, match=r"nowhere\.png"):
        prepare_inputs(loaded, "<image>", ["nowhere.png"])
    with pytest.raises(UserError, match="The prompt has 2 <image>, but 1 images are given"):
        prepare_inputs(loaded, "<image> <image>", ["images/src/landscape.jpg"])
    text_only = load_model("ckpt/base-llm")
    with pytest.raises(UserError, match="the model is text-only"):
        prepare_inputs(text_only, "<image>", ["images/src/landscape.jpg"])
