"""DeepSpeed's files: those in configs/, how they are found, and what is refused in a user's own."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llava_ft.args import parse_args
from llava_ft.args.deepspeed_file import (
    check_deepspeed_config,
    choose_offloaded_adam,
    read_deepspeed_config,
)
from llava_ft.errors import UserError

REPO = Path(__file__).parents[1]
CONFIGS = REPO / "configs"
CLI = json.loads((Path(__file__).parent / "golden" / "cli.json").read_text())

STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}
FLAGS = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "fp16": False,
    "bf16": True,
}

deepspeed_config = pytest.importorskip("deepspeed.runtime.config")


def read(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def changed(**changes: Any) -> dict[str, Any]:
    """zero2.json with other values; a name such as zero_optimization__stage reaches into a section, None removes."""
    config = read("zero2")
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = config
        for section in sections:
            place = place[section]
        if value is None:
            del place[key]
        else:
            place[key] = value
    return config


class TestFiles:
    def test_all_are_there(self):
        assert {path.stem for path in CONFIGS.glob("*.json")} == set(STAGES)

    @pytest.mark.parametrize(("name", "stage"), STAGES.items())
    def test_holds_whole_numbers_and_no_computed_bucket(self, name: str, stage: int):
        assert not re.search(r"\d[.e]\d", (CONFIGS / f"{name}.json").read_text())
        zero = read(name)["zero_optimization"]
        assert "auto" not in zero.values()
        assert zero["stage"] == stage
        assert ("offload_optimizer" in zero) == name.endswith("_offload")
        assert ("offload_param" in zero) == (name == "zero3_offload")

    @pytest.mark.parametrize("name", STAGES)
    def test_goes_with_every_flag(self, name: str):
        for batch, accumulation, norm, half in ((1, 1, 0.0, "fp16"), (16, 8, 1.0, "bf16"), (2, 1, 0.5, None)):
            values = dict(zip(FLAGS, (batch, accumulation, norm, half == "fp16", half == "bf16"), strict=True))
            assert check_deepspeed_config(read(name), name, values) == []

    @pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
    def test_equals_the_original_where_that_is_usable(self, name: str):
        config = read(name)
        original = CLI["deepspeed"][f"{name}.json"]
        left_out = {"zero_optimization.gather_16bit_weights_on_model_save"}
        for key, value in original.items():
            part, *rest = key.split(".")
            if part in ("optimizer", "scheduler") or key in left_out:
                continue
            ours = config[part]
            for inner in rest:
                ours = ours[inner]
            assert ours == value or (value == "auto" and isinstance(ours, int)), key

    @pytest.mark.parametrize("name", STAGES)
    def test_deepspeed_takes_every_value_as_it_is(self, name: str):
        config = read(name)
        config |= {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 4, "gradient_accumulation_steps": 2}
        config |= {"gradient_clipping": 1.0, "fp16": {"enabled": False}, "bf16": {"enabled": True}}
        accepted = deepspeed_config.DeepSpeedConfig(config).zero_config
        for key, value in config["zero_optimization"].items():
            if isinstance(value, int):
                fields = type(accepted).model_fields
                field = next(f for f, info in fields.items() if key in (f, info.alias))
                assert getattr(accepted, field) == value, key


class TestLookUp:
    @pytest.mark.parametrize("name", STAGES)
    @pytest.mark.parametrize("form", ["{}", "{}.json", "configs/{}.json", "./scripts/{}.json", "/nowhere/{}.json"])
    def test_by_name(self, name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        notes: list[str] = []
        asked = form.format(name)
        assert read_deepspeed_config(asked, notes)[1] == str(CONFIGS / f"{name}.json")
        assert notes == [f"deepspeed={asked} is taken from {CONFIGS / f'{name}.json'}."]

    def test_a_file_of_the_user_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs/zero2.json").write_text("{}")
        assert read_deepspeed_config("zero2", [])[1] == "configs/zero2.json"
        (tmp_path / "zero2.json").write_text("{}")
        assert read_deepspeed_config("zero2.json", [])[1] == "zero2.json"

    def test_an_unknown_name(self):
        known = ", ".join(sorted(f"{name}.json" for name in STAGES))
        with pytest.raises(UserError) as error:
            read_deepspeed_config("zero2_ofload", [])
        assert str(error.value) == (
            "deepspeed=zero2_ofload: there is no such file. Give the path of a DeepSpeed JSON file or one of the names "
            f"in configs: {known}. Did you mean zero2_offload?"
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"zero_optimisation": {}}, r"there is no key zero_optimisation. Did you mean zero_optimization\?"),
            ({"train_micro_batch_size_per_gpus": 4}, r"Did you mean train_micro_batch_size_per_gpu\?"),
            ({"optimizer": {"type": "AdamW"}}, "optimizer cannot be set here: it is left to optim.* Remove optimizer"),
            ({"scheduler": {}}, "scheduler cannot be set here: it is left to lr_scheduler_type and warmup_steps"),
            ({"zero_optimization": None}, r'zero_optimization is null; .* Write "zero_optimization": {"stage": 2}'),
            ({"zero_optimization": True}, "zero_optimization is true; it has to be an object"),
            ({"bf16": True}, r'bf16 is true; it has to be an object. Write "bf16": {"enabled": "auto"}'),
            (
                {"zero_optimization__stage3_prefetch_bucket_size": 15099494.4},
                r"stage3_prefetch_bucket_size is 15099494.4; it has to be a whole number. Write 15099494\.",
            ),
            ({"zero_optimization__reduce_bucket_size": "5e8"}, 'reduce_bucket_size is "5e8"; it has to be a whole'),
            ({"zero_optimization__stage": 4}, "zero_optimization.stage is 4: "),
            ({"zero_optimization__round_robin_gradients": True}, "could not be resumed. Remove the key"),
            (
                {"zero_optimization__reduce_buket_size": 1},
                r"no key zero_optimization.reduce_buket_size. Did you mean reduce_bucket_size\?",
            ),
            ({"zero_optimization__offload_optimizer": {"device": "gpu"}}, r'offload_optimizer.device is "gpu": '),
            (
                {"zero_optimization__sub_group_size": "auto"},
                "zero_optimization.sub_group_size is auto, which nothing fills in. Write a value",
            ),
            ({"steps_per_print": "auto"}, "steps_per_print is auto, which nothing fills in"),
            (
                {"train_micro_batch_size_per_gpu": 4},
                r"train_micro_batch_size_per_gpu is 4, but per_device_train_batch_size is 16. "
                r'Write "train_micro_batch_size_per_gpu": "auto", or make them equal.',
            ),
            (
                {"gradient_accumulation_steps": 8},
                "gradient_accumulation_steps is 8, but gradient_accumulation_steps is 2",
            ),
            ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps is absent, which counts as 1, but"),
            ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but max_grad_norm is 1.0"),
            ({"train_batch_size": 256}, r"train_batch_size is 256, but 4 ranks x 16 x 2 accumulation steps are 128"),
            ({"train_micro_batch_size_per_gpu": None, "train_batch_size": None}, "it has no batch size"),
            (
                {"fp16__enabled": True, "bf16__enabled": True},
                "fp16 and bf16 are both enabled",
            ),
            ({"bf16__enabled": False}, "bf16.enabled is false, but the flag bf16 is true"),
            ({"bf16": None}, r'it has no section bf16, but the flag bf16 is true. Write "bf16": {"enabled": "auto"}'),
        ],
    )
    def test_what_cannot_work(self, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(UserError, match=r"^deepspeed=mine\.json: ") as error:
            check_deepspeed_config(changed(**changes), "mine.json", FLAGS)
        assert re.search(message, str(error.value)), error.value

    @pytest.mark.parametrize(
        "changes",
        [
            {"train_micro_batch_size_per_gpu": 16},
            {"gradient_accumulation_steps": 2},
            {"gradient_clipping": 1},
            {"train_batch_size": 32},
            {"fp16": None},
            {"bf16__enabled": True},
            {"zero_optimization__reduce_bucket_size": 5e8},
            {"zero_optimization__reduce_bucket_size": "auto"},
            {"zero_optimization__stage3_gather_16bit_weights_on_model_save": True},
            {"zero_optimization__gather_16bit_weights_on_model_save": True},
            {"activation_checkpointing": {"partition_activations": True}},
        ],
    )
    def test_what_can(self, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert check_deepspeed_config(changed(**changes), "mine.json", FLAGS) == []

    def test_what_has_no_effect_is_noted(self):
        notes = check_deepspeed_config(changed(gradient_clipping=None, my_remark="tuned in May"), "mine.json", FLAGS)
        assert notes == [
            "Gradients are not clipped: mine.json has no gradient_clipping, so max_grad_norm=1 has no effect. "
            '"gradient_clipping": "auto" in it would apply it.',
            "DeepSpeed may not know my_remark in mine.json and ignore it.",
        ]

    def test_before_anything_is_loaded(self, tmp_path: Path):
        (tmp_path / "mine.json").write_text(json.dumps(changed(train_micro_batch_size_per_gpu=4)))
        argv = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", str(tmp_path)]
        parsed = parse_args([*argv, "--deepspeed", str(tmp_path / "mine.json"), "--use_cpu"])
        with pytest.raises(UserError, match="per_device_train_batch_size is 8"):
            _ = parsed.training

    def test_a_mapping_in_the_configuration(self, tmp_path: Path):
        text = "model_name_or_path: m\ndata_path: d.json\noutput_dir: o\nuse_cpu: true\n"
        text += "deepspeed: {zero_optimization: {stag: 2}, train_micro_batch_size_per_gpu: auto}\n"
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError, match=r"deepspeed=the mapping: there is no key zero_optimization.stag. Did you"):
            _ = parse_args(["--config", str(tmp_path / "run.yaml")]).training


class TestOffloadedAdam:
    def test_torchs_where_there_is_no_gpu(self):
        config = read("zero2_offload")
        (note,) = choose_offloaded_adam(config, uses_cpu=True)
        assert note == "The offloaded optimizer is torch's: there is no GPU to offload from."
        assert config["zero_force_ds_cpu_optimizer"] is False

    def test_deepspeeds_where_there_is_one_and_a_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        compiler = tmp_path / "c++"
        compiler.write_text("")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        config = read("zero3_offload")
        assert choose_offloaded_adam(config, uses_cpu=False) == []
        assert "zero_force_ds_cpu_optimizer" not in config

    def test_torchs_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        config = read("zero3_offload")
        (note,) = choose_offloaded_adam(config, uses_cpu=False)
        assert "there is no C++ compiler to build DeepSpeed's with" in note
        assert config["zero_force_ds_cpu_optimizer"] is False

    def test_a_file_that_has_decided(self):
        config = read("zero2_offload") | {"zero_force_ds_cpu_optimizer": True}
        assert choose_offloaded_adam(config, uses_cpu=True) == []
        assert config["zero_force_ds_cpu_optimizer"] is True

    @pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
    def test_without_offloading(self, name: str):
        config = read(name)
        assert choose_offloaded_adam(config, uses_cpu=True) == []
        assert config == read(name)


def test_stage_0_is_torchs_own_data_parallelism(tmp_path: Path):
    args = parse_args(["--data_path", "x", "--model_name_or_path", "y", "--output_dir", "z", "--deepspeed", "zero0"])
    assert args.training.deepspeed is None
    assert any("stage 0 divides nothing" in note for note in args.notes)
