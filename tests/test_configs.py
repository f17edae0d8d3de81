"""The recipes in configs/ are the published ones, and DeepSpeed takes its files."""

import json
import re
from pathlib import Path

import pytest
import yaml

from llava_ft.args import parse_args, resolved_config

REPO = Path(__file__).parents[1]
CONFIGS = REPO / "configs"
CLI = json.loads((Path(__file__).parent / "golden" / "cli.json").read_text())

RECIPES = {
    "pretrain": "scripts/v1_5/pretrain.sh",
    "finetune": "scripts/v1_5/finetune.sh",
    "lora": "scripts/v1_5/finetune_lora.sh",
    "task_lora": "scripts/v1_5/finetune_task_lora.sh",
}
NOT_TAKEN_OVER = {"report_to", "lazy_preprocess"}
"""wandb needs an account, so it is left to the user; lazy_preprocess has no effect."""


def published(script: str) -> dict[str, object]:
    """What the original script sets, for the 7B model."""
    argv = [
        word
        for key, value in CLI["scripts"][script]["flags"].items()
        for word in (f"--{key}", value.replace("13b", "7b"))
    ]
    return resolved_config(parse_args(argv))


class TestRecipes:
    @pytest.mark.parametrize(("name", "script"), RECIPES.items())
    def test_equals_the_published_one(self, name, script):
        ours = resolved_config(parse_args(["--config", str(CONFIGS / f"{name}.yaml")]))
        theirs = published(script)
        assert set(ours) == set(theirs)
        ours["deepspeed"], theirs["deepspeed"] = (Path(str(c["deepspeed"])).name for c in (ours, theirs))
        assert {k: v for k, v in ours.items() if k not in NOT_TAKEN_OVER} == {
            k: v for k, v in theirs.items() if k not in NOT_TAKEN_OVER
        }

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
    def test_parses_and_names_its_command(self, path):
        assert parse_args(["--config", path.name]).notes == []
        assert f"--config {path.name}" in path.read_text().split("\n\n")[0]

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
    def test_every_deepspeed_file_it_names_is_there(self, path):
        name = yaml.safe_load(path.read_text()).get("deepspeed")
        assert name is None or (REPO / name).is_file()


class TestDeepSpeedFiles:
    @pytest.mark.parametrize("name", ["zero2.json", "zero3.json", "zero3_offload.json"])
    def test_holds_whole_numbers_and_no_computed_bucket(self, name):
        text = (CONFIGS / name).read_text()
        assert not re.search(r"\d[.e]\d", text)
        zero = json.loads(text)["zero_optimization"]
        assert "auto" not in zero.values()
        assert zero["stage"] == (2 if name == "zero2.json" else 3)

    @pytest.mark.parametrize("name", ["zero2.json", "zero3.json", "zero3_offload.json"])
    def test_leaves_optimizer_and_scheduler_to_the_trainer(self, name):
        config = json.loads((CONFIGS / name).read_text())
        assert not {"optimizer", "scheduler"} & set(config)
        assert config["gradient_clipping"] == "auto"

    @pytest.mark.parametrize("name", ["zero2.json", "zero3.json", "zero3_offload.json"])
    def test_equals_the_original_where_that_is_usable(self, name):
        config = json.loads((CONFIGS / name).read_text())
        original = CLI["deepspeed"][name]
        left_out = {"zero_optimization.gather_16bit_weights_on_model_save"}
        for key, value in original.items():
            part, *rest = key.split(".")
            if part in ("optimizer", "scheduler") or key in left_out:
                continue
            ours = config[part]
            for inner in rest:
                ours = ours[inner]
            assert ours == value or (value == "auto" and isinstance(ours, int)), key

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["zero2.json", "zero3.json", "zero3_offload.json"])
    def test_is_accepted(self, name):
        deepspeed_config = pytest.importorskip("deepspeed.runtime.config")
        config = json.loads((CONFIGS / name).read_text())
        config |= {
            "train_micro_batch_size_per_gpu": 2,
            "train_batch_size": 4,
            "gradient_accumulation_steps": 2,
        }
        config |= {"gradient_clipping": 1.0, "fp16": {"enabled": False}, "bf16": {"enabled": True}}
        accepted = deepspeed_config.DeepSpeedConfig(config).zero_config
        for key, value in config["zero_optimization"].items():
            if isinstance(value, int):
                fields = type(accepted).model_fields
                field = next(f for f, info in fields.items() if key in (f, info.alias))
                assert getattr(accepted, field) == value, key
