"""Sizes on disk are those of the files that a run writes."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from llava_ft.args import parse_args
from llava_ft.planning.disk import WHOLE_MODEL, checkpoint_files
from llava_ft.planning.model import build_model, parameter_shapes
from llava_ft.planning.report import as_dict, as_text
from llava_ft.training.run import prepare_run
from tests.planning.helpers import GPU_7B, LORA, plan_of, request_of, write_configs
from tests.training.helpers import METHODS, flags, prepare, train

SMALL = 40_000
"""Bytes that names and headers may take: a pickle has some hundred a tensor."""


def files_of(argv: list[str], gpus: int = 1, **options: bool) -> dict[str, int]:
    outline, request = request_of(argv, gpus=gpus)
    return checkpoint_files(parameter_shapes(build_model(outline, request), request), request, **options)


def size_of(directory: Path, name: str) -> int:
    pattern = "model*.safetensors" if name == WHOLE_MODEL else name.replace("stepN", "step*")
    return sum(path.stat().st_size for path in directory.glob(pattern))


class TestMergedBase:
    def test_is_planned_as_it_is_written(self, in_recordings, tmp_path):
        train(tmp_path / "first", max_steps="1")
        own = dict.fromkeys(("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter"))
        argv = flags(tmp_path / "out", **own, init_from=tmp_path / "first", adapter_mode="merge_first")
        prepare_run(parse_args(argv))
        plan = plan_of(argv)
        size = size_of(tmp_path / "out/merged_base", WHOLE_MODEL)
        assert plan.merged_base is not None
        assert plan.merged_base <= size <= plan.merged_base + SMALL
        assert "merged_base, once" in as_text(plan)
        assert as_dict(plan)["disk"]["merged_base"] == plan.merged_base

    def test_other_runs_have_none(self, tmp_path):
        plan = plan_of(write_configs(tmp_path))
        assert plan.merged_base is None
        assert "merged_base" not in as_text(plan)


class TestAgainstRuns:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("extra", [{}, {"mm_use_im_start_end": "True", "pretrain_mm_mlp_adapter": None}])
    def test_files_of_a_run(self, in_recordings, tmp_path, method, extra):
        changes = {"max_steps": "1", "save_steps": "1", **extra}
        train(tmp_path / "run", method, **changes)
        argv = flags(tmp_path / "run", method, **changes)
        for directory, is_final in ((tmp_path / "run" / "checkpoint-1", False), (tmp_path / "run", True)):
            planned = files_of(argv, is_final=is_final)
            assert planned
            for name, size in planned.items():
                assert size <= size_of(directory, name) <= size + SMALL, name

    @pytest.mark.slow
    @pytest.mark.parametrize("stage", [2, 3])
    def test_files_of_a_run_under_zero(self, in_recordings, tmp_path, stage):
        pytest.importorskip("deepspeed")
        from tests.training.helpers import start

        changes = {"max_steps": "1", "save_steps": "1", "lora_r": "64", "deepspeed": f"zero{stage}.json"}
        argv = flags(tmp_path / "run", "lora", **changes)
        process = start(argv)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
        for name, size in files_of(argv).items():
            assert size <= size_of(tmp_path / "run" / "checkpoint-1", name) <= size * 1.02 + 4 * SMALL, name


class TestPublished:
    def test_a_lora_run_of_7b(self):
        argv = [*GPU_7B, *LORA]
        trained = 319_815_680 + 20_979_712
        assert files_of(argv) == {
            "adapter_model.bin": 4 * 319_815_680,
            "non_lora_trainables.bin": 4 * 20_979_712,
            "optimizer.pt": 8 * trained,
        }
        assert sum(files_of(argv, is_final=True).values()) == 4 * trained

    @pytest.mark.parametrize(("stage", "per_value"), [(2, 12 + 2), (3, 12)])
    def test_under_zero_the_masters_are_there_too(self, stage, per_value):
        found = files_of([*GPU_7B, *LORA, "--deepspeed", f"zero{stage}.json"], gpus=8)
        trained = 319_815_680 + 20_979_712
        shards = sum(size for name, size in found.items() if name.startswith("global_step"))
        assert shards == per_value * trained


class TestVisionCache:
    @pytest.mark.parametrize(
        "extra",
        [
            {},
            {"bf16": "True"},
            {"vision_cache_dtype": "int8"},
            {"mm_vision_select_feature": "cls_patch"},
            {"image_aspect_ratio": "anyres"},
        ],
        ids=lambda extra: " ".join(extra),
    )
    def test_what_a_run_takes(self, in_recordings, tmp_path, extra):
        changes = {**extra, "vision_cache": tmp_path / "cache"}
        planned = plan_of(flags(tmp_path / "run", "lora", **changes)).vision_cache
        prepare(tmp_path / "run", "lora", **changes)
        files = (tmp_path / "cache").rglob("features-*.safetensors")
        assert planned == sum(tensor.nbytes for file in files for tensor in load_file(file).values())

    def test_it_is_in_the_report(self, in_recordings, tmp_path):
        plan = plan_of(flags(tmp_path / "run", "lora", vision_cache=tmp_path / "cache"))
        assert "the vision cache, at most" in as_text(plan)
        assert as_dict(plan)["disk"]["vision_cache"] == plan.vision_cache
        assert not (tmp_path / "cache").exists()

    def test_without_it_there_is_none(self, in_recordings, tmp_path):
        plan = plan_of(flags(tmp_path / "run", "lora"))
        assert plan.vision_cache is None
        assert "vision cache" not in as_text(plan)

    def test_the_tower_takes_no_memory(self, tmp_path):
        argv = [*write_configs(tmp_path), *LORA]
        plain, cached = plan_of(argv), plan_of([*argv, "--vision_cache", str(tmp_path)])
        parts = {part.part: part.num_bytes for part in plain.parts}
        assert {part.part: part.num_bytes for part in cached.parts} == {
            name: size for name, size in parts.items() if name != "vision tower"
        }
        assert cached.memory.tensors < plain.memory.tensors
        assert "vision tower" not in cached.memory.components

    def test_a_tower_that_is_to_be_saved_is_held(self, tmp_path):
        argv = [*write_configs(tmp_path), "--vision_cache", str(tmp_path), "--save_vision_tower", "True"]
        held = plan_of(argv)
        assert "vision tower" in {part.part for part in held.parts}
        assert "vision tower" not in held.memory.components
