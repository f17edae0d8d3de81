"""The model of a plan is the model of the run, known from config.json alone."""

import json
import logging

import pytest

from llava_ft.errors import CheckpointError, UserError
from llava_ft.planning.model import build_model, parameter_shapes
from llava_ft.planning.plan import summarise
from tests.planning.helpers import GPU_7B, LORA, TINY_CLIP, TINY_LLAMA, plan_of, request_of, write_configs
from tests.training.helpers import METHODS, flags, prepare


class TestAgainstRuns:
    @pytest.mark.parametrize("extra", [{}, {"mm_use_im_start_end": "True", "pretrain_mm_mlp_adapter": None}])
    @pytest.mark.parametrize("method", METHODS)
    def test_has_the_parameters_of_the_run(self, in_recordings, tmp_path, method, extra):
        run = prepare(tmp_path, method, **extra)
        real = {
            name: (tuple(parameter.shape), parameter.requires_grad, parameter.dtype)
            for name, parameter in run.trainer.model.named_parameters()
        }
        outline, request = request_of(flags(tmp_path, method, **extra))
        shapes = parameter_shapes(build_model(outline, request), request)
        assert {shape.name: (shape.shape, shape.is_trained, shape.dtype) for shape in shapes} == real

    def test_is_found_with_nothing_but_its_configuration(self, tmp_path):
        outline, request = request_of(write_configs(tmp_path))
        shapes = parameter_shapes(build_model(outline, request), request)
        assert all(parameter.is_meta for parameter in build_model(outline, request).parameters())
        assert {shape.part for shape in shapes} == {
            "embeddings",
            "head",
            "language model",
            "projector",
            "vision tower",
        }
        assert outline.config.tokens_per_image == 16

    def test_an_adapter_to_start_from_says_what_the_model_is(self, tmp_path):
        argv = write_configs(tmp_path)
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "config.json").write_text(json.dumps({"mm_vision_tower": str(tmp_path / "clip")}))
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": argv[1]}))
        del argv[2:4]
        outline, _ = request_of([*argv, "--lora_enable", "True", "--lora_weight_path", str(adapter)])
        assert outline.spec.has_vision


class TestPublished:
    def test_7b_has_the_published_numbers_of_parameters(self):
        outline, request = request_of([*GPU_7B, *LORA])
        parts = {
            part.part: part for part in summarise(parameter_shapes(build_model(outline, request), request), request)
        }
        language = sum(parts[name].parameters for name in ("embeddings", "language model", "head"))
        assert language == 6_738_415_616
        assert parts["vision tower"].parameters == 303_507_456
        assert parts["projector"].parameters == parts["projector"].trained == 20_979_712
        assert parts["LoRA"].trained == 319_815_680
        assert parts["LoRA"].dtype == "float32"
        assert parts["head"].dtype == "bfloat16"

    def test_llava_1_6_keeps_its_own_tower(self):
        outline, request = request_of(["--model_name_or_path", "liuhaotian/llava-v1.6-vicuna-7b"])
        shapes = parameter_shapes(build_model(outline, request), request)
        assert [shape.numel for shape in shapes if shape.part == "image newline"] == [4096]
        assert outline.spec.holds_vision_tower
        assert not request_of(GPU_7B)[0].spec.holds_vision_tower
        assert outline.config.image_geometry.max_tokens == 2928

    def test_13b(self):
        outline, request = request_of(["--model_name_or_path", "lmsys/vicuna-13b-v1.5"])
        shapes = parameter_shapes(build_model(outline, request), request)
        assert sum(shape.numel for shape in shapes) == 13_015_864_320
        assert not outline.spec.has_vision

    def test_says_that_it_is_used(self):
        outline, _ = request_of(GPU_7B)
        assert outline.spec.notes == (
            "liuhaotian/llava-v1.5-7b is not on this machine; its published architecture is used.",
            "openai/clip-vit-large-patch14-336 is not on this machine; its published architecture is used.",
        )


class TestTiles:
    def plan(self, folder, max_length, *extra):
        argv = [*write_configs(folder), "--image_aspect_ratio", "anyres", "--mm_patch_merge_type", "spatial_unpad"]
        return plan_of([*argv, "--model_max_length", str(max_length), *extra])

    def test_the_largest_image_is_planned_for(self, tmp_path):
        plan = self.plan(tmp_path, 100)
        assert (plan.batch.image_size_wh, plan.model.config.image_geometry.num_tokens(plan.batch.image_size_wh)) == (
            (56, 56),
            16 + 8 * 9,
        )
        assert any("taken to be 56 x 56 pixels" in note and "88, from 5 tiles" in note for note in plan.notes)

    def test_of_those_that_fit(self, tmp_path):
        plan = self.plan(tmp_path, 60)
        assert 40 < plan.model.config.image_geometry.num_tokens(plan.batch.image_size_wh) < 60
        assert any("An image can take 88 positions, which model_max_length=60 has no room for" in n for n in plan.notes)

    def test_if_none_fits(self, tmp_path):
        plan = self.plan(tmp_path, 16)
        assert plan.batch.num_images == 0
        assert any("No image fits into model_max_length=16: the overview alone takes 16" in note for note in plan.notes)


class TestRefused:
    def test_a_model_that_is_nowhere(self):
        with pytest.raises(CheckpointError, match=r"nobody/nothing is no directory here.*weights are not needed"):
            request_of(["--model_name_or_path", "nobody/nothing"])

    def test_a_directory_without_configuration(self, tmp_path):
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(CheckpointError, match=r"neither config\.json nor .*It holds notes\.txt"):
            request_of(["--model_name_or_path", str(tmp_path)])

    @pytest.mark.parametrize(
        ("file", "message"),
        [("adapter_config.json", "holds a LoRA adapter"), ("mm_projector.bin", "holds a projector")],
    )
    def test_what_a_run_has_written_instead_of_its_base(self, tmp_path, file, message):
        argv = write_configs(tmp_path)
        (tmp_path / "llm" / file).write_text("{}")
        with pytest.raises(CheckpointError, match=message):
            request_of(argv)

    def test_another_architecture(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"model_type": "gpt2"}))
        with pytest.raises(UserError, match="'gpt2' model"):
            request_of(["--model_name_or_path", str(tmp_path)])

    def test_a_tower_that_is_no_clip(self, tmp_path):
        argv = write_configs(tmp_path)
        (tmp_path / "clip" / "config.json").write_text(json.dumps(TINY_CLIP | {"model_type": "siglip"}))
        with pytest.raises(UserError, match="'siglip' model"):
            request_of(argv)

    def test_an_adapter_that_is_not_there(self, tmp_path):
        argv = [*write_configs(tmp_path), "--lora_enable", "True", "--lora_weight_path", str(tmp_path / "none")]
        with pytest.raises(CheckpointError, match=r"lora_weight_path=.*none cannot be started from"):
            request_of(argv)


def test_nothing_is_logged_about_weights(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        outline, request = request_of(write_configs(tmp_path))
        build_model(outline, request)
    assert caplog.records == []
