"""The recipes in configs/ are the published ones."""

import json
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
