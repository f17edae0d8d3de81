"""Sizes on disk are those of the files that a run writes."""

from pathlib import Path

import pytest

from llava_ft.planning.disk import WHOLE_MODEL, checkpoint_files
from llava_ft.planning.shapes import build_model, parameter_shapes
from tests.planning.helpers import GPU_7B, LORA, request_of
from tests.training.helpers import METHODS, flags, train

SMALL = 40_000
"""Bytes that names and headers may take: a pickle has some hundred a tensor."""


def files_of(argv: list[str], gpus: int = 1, **options: bool) -> dict[str, int]:
    planned, request = request_of(argv, gpus=gpus)
    return checkpoint_files(parameter_shapes(build_model(planned, request), request), request, **options)


def size_of(directory: Path, name: str) -> int:
    pattern = "model*.safetensors" if name == WHOLE_MODEL else name.replace("stepN", "step*")
    return sum(path.stat().st_size for path in directory.glob(pattern))


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
