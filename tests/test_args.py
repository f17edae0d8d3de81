"""The command-line contract: every flag of the original, YAML, old spellings, refusals."""

import dataclasses
import enum
import json
import math
import pickle
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.training_args import OptimizerNames

from llava_ft.args import (
    DataArguments,
    ModelArguments,
    ParsedArgs,
    TrainingFlags,
    format_help,
    parse_args,
    resolved_config,
    to_yaml,
)
from llava_ft.args.build import (
    TrainingArguments,
    _copy_batches_without_waiting,
    adapt_to_device,
)
from llava_ft.args.deepspeed_file import read_deepspeed_config
from llava_ft.args.flags import TABLE, all_flags, fields_of_transformers, inherited_types
from llava_ft.args.value_types import ConversionError, ValueType
from llava_ft.constants import ORIGINAL_DEFAULTS
from llava_ft.errors import UserError

CLI = json.loads((Path(__file__).parent / "golden" / "cli.json").read_text())
REPO = Path(__file__).parents[1]
BASE = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]

TEXTS = st.text(max_size=12).filter(lambda text: not text.startswith("--"))
"""What can stand as a value on a command line."""

OWN_FLAGS = {
    "activation_offload",
    "adapter_mode",
    "allow_base_mismatch",
    "attn_implementation",
    "bad_sample_limit",
    "bits",
    "cache_dir",
    "check_images",
    "data_cache_dir",
    "data_path",
    "double_quant",
    "force",
    "freeze_backbone",
    "freeze_mm_mlp_adapter",
    "gradient_checkpointing_every",
    "group_by_modality_length",
    "image_aspect_ratio",
    "image_exif_transpose",
    "image_fast_decode",
    "image_folder",
    "image_grid_pinpoints",
    "init_from",
    "is_multimodal",
    "lazy_preprocess",
    "length_multiple",
    "logging_dir",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_enable",
    "lora_r",
    "lora_target_modules",
    "fast_lora",
    "lora_weight_path",
    "loss_normalization",
    "mm_patch_merge_type",
    "mm_projector_lr",
    "mm_projector_type",
    "mm_use_im_patch_token",
    "mm_use_im_start_end",
    "mm_vision_select_feature",
    "mm_vision_select_layer",
    "model_max_length",
    "model_name_or_path",
    "mpt_attn_impl",
    "on_bad_sample",
    "overwrite_output_dir",
    "packing",
    "padding_free",
    "preprocessing_num_workers",
    "pretrain_mm_mlp_adapter",
    "quant_type",
    "s2_scales",
    "save_vision_tower",
    "supervise",
    "truncation",
    "tune_mm_mlp_adapter",
    "validation_data_path",
    "validation_fraction",
    "version",
    "vision_cache",
    "vision_cache_dtype",
    "vision_tower",
    "weights_format",
}
"""The public surface. A new flag is a decision: add it here, to docs/reference/arguments.md and to the changelog."""


INHERITED_WITH_OWN_DEFAULT = {
    "optim",
    "remove_unused_columns",
    "logging_nan_inf_filter",
    "report_to",
    "prediction_loss_only",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
}
"""Fields of `TrainingFlags` that belong to `transformers.TrainingArguments`."""


def script_argv(name: str, **variables: str) -> list[str]:
    """The command line of a published script, with its shell variables replaced."""
    argv = []
    for key, value in CLI["scripts"][name]["flags"].items():
        for variable, text in {
            "MODEL_VERSION": "vicuna-v1-3-7b",
            "PROMPT_VERSION": "v1",
            **variables,
        }.items():
            value = value.replace(f"${variable}", text)
        argv += [f"--{key}", value]
    return argv


def parse(*extra: str) -> ParsedArgs:
    return parse_args([*BASE, *extra])


def parse_yaml(tmp_path: Path, text: str, *extra: str) -> ParsedArgs:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndata_path: d.json\noutput_dir: o\n" + text)
    return parse_args(["--config", str(path), *extra])


class TestPublicSurface:
    def test_own_flags_are_a_frozen_set(self):
        ours = {f.name for owner in (ModelArguments, DataArguments, TrainingFlags) for f in dataclasses.fields(owner)}
        assert ours - INHERITED_WITH_OWN_DEFAULT == OWN_FLAGS
        assert not OWN_FLAGS & {field.name for field in dataclasses.fields(transformers.TrainingArguments)}

    @pytest.mark.parametrize("group", ["ModelArguments", "DataArguments", "TrainingArguments_added"])
    def test_every_original_argument_is_there_with_its_type(self, group):
        owners = {"ModelArguments": ModelArguments, "DataArguments": DataArguments}
        names = {field.name for field in dataclasses.fields(owners.get(group, TrainingFlags))}
        for name, spec in CLI[group].items():
            assert name in names
            original = spec["type"].removeprefix("Optional[").removesuffix("]")
            original = original.removeprefix("<class '").removesuffix("'>")
            assert all_flags()[name].kinds == {original}, name

    def test_defaults_equal_the_original_but_for_the_documented_ones(self):
        differing = {}
        for group, owner in (
            ("ModelArguments", ModelArguments),
            ("DataArguments", DataArguments),
            ("TrainingArguments_added", TrainingFlags),
        ):
            fields = {field.name: field for field in dataclasses.fields(owner)}
            for name, spec in CLI[group].items():
                if fields[name].default != spec["default"]:
                    differing[name] = spec["default"]
        assert set(differing) == {"model_name_or_path", "version"} | set(ORIGINAL_DEFAULTS)
        unlike = {name for name, value in ORIGINAL_DEFAULTS.items() if value != differing.get(name)}
        assert unlike == {"mm_use_im_patch_token"}

    def test_overridden_defaults_of_transformers_equal_the_original(self):
        defaults = dataclasses.asdict(TrainingFlags())
        defaults, _ = adapt_to_device(defaults, has_cuda=False, has_tf32=False)  # the optimizer depends on the device
        for name, spec in CLI["TrainingArguments_overridden"].items():
            assert defaults[name] == spec["llava"]["default"]

    @pytest.mark.parametrize("name", sorted(CLI["TrainingArguments_inherited"]))
    def test_every_inherited_argument_of_the_original_is_accepted(self, name):
        spec = CLI["TrainingArguments_inherited"][name]
        samples = {"bool": "False", "int": "1", "float": "1", "str": "none", "Dict": "{}", "dict": "{}"}
        named = {
            "debug": "underflow_overflow",
            "evaluation_strategy": "no",
            "fsdp": "full_shard",
            "hub_strategy": "end",
            "logging_strategy": "steps",
            "lr_scheduler_type": "cosine",
            "log_level": "info",
            "optim": "sgd",
            "save_strategy": "epoch",
            "warmup_ratio": "0.5",
        }
        kind = spec["type"].removeprefix("Optional[").removesuffix("]")
        kind = kind.removeprefix("<class '").removesuffix("'>")
        args = parse(f"--{name}", named.get(name) or samples.get(kind, "none"))
        taken = name in args.inherited or name in {field.name for field in dataclasses.fields(TrainingFlags)}
        assert taken or any(name in note for note in args.notes)

    def test_the_table_of_inherited_fields_equals_the_class(self):
        """After an update of transformers: python scripts/update_transformers_fields.py."""
        table = json.loads(TABLE.read_text())
        assert table == {"transformers": transformers.__version__, "fields": fields_of_transformers()}
        fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
        assert fields - set(table["fields"]) == {"parallelism_config"}  # takes an object
        assert fields >= INHERITED_WITH_OWN_DEFAULT
        assert dataclasses.fields(TrainingArguments)[0].name in all_flags()

    def test_another_transformers_is_asked_itself(self, monkeypatch):
        @dataclasses.dataclass
        class Newer(transformers.TrainingArguments):
            brand_new: typing.Literal["a", "b"] = "a"
            an_object: Path | None = None

        monkeypatch.setattr("transformers.training_args.TrainingArguments", Newer)
        monkeypatch.setattr("importlib.metadata.version", lambda package: "5.99.0")
        for cached in (inherited_types, all_flags):
            cached.cache_clear()
        try:
            assert parse("--brand_new", "b").inherited == {"output_dir": "o", "brand_new": "b"}
            with pytest.raises(UserError, match=r"--brand_new=c: it is not in the list. Allowed: a \| b"):
                parse("--brand_new", "c")
            with pytest.raises(UserError, match="--an_object=x: there is no such flag"):
                parse("--an_object", "x")
        finally:
            for cached in (inherited_types, all_flags):
                cached.cache_clear()

    @pytest.mark.parametrize("owner", [ModelArguments, DataArguments, TrainingFlags])
    def test_every_field_says_what_it_is(self, owner):
        for field in dataclasses.fields(owner):
            assert len(field.metadata["help"]) > 10, field.name
            assert field.metadata["help"].endswith("."), field.name

    def test_help_lists_every_own_flag(self):
        text = format_help("train.py")
        assert all(f"--{name}  " in text for name in OWN_FLAGS)
        assert max(map(len, text.splitlines())) < 110

    def test_documentation_states_every_own_flag_with_its_default_and_help(self):
        rows = [
            [cell.strip() for cell in line.strip().strip("|").replace("\\|", "\0").split("|")]
            for line in (REPO / "docs/reference/arguments.md").read_text().splitlines()
            if line.startswith("| `")
        ]
        documented = {row[0].strip("`"): row for row in rows if len(row) == 5}
        for owner in (ModelArguments, DataArguments, TrainingFlags):
            for field in dataclasses.fields(owner):
                row = documented[field.name]
                default = field.default
                if default is dataclasses.MISSING:
                    has_factory = field.default_factory is not dataclasses.MISSING
                    default = field.default_factory() if has_factory else "required"
                shown = default if default == "required" else json.dumps(default)
                assert row[2].strip("`") == shown, field.name
                assert row[3].replace("\0", "|") == field.metadata["help"], field.name


class TestPublishedCommandLines:
    @pytest.mark.parametrize("name", sorted(CLI["scripts"]))
    def test_parses_unchanged(self, name):
        flags = CLI["scripts"][name]["flags"]
        parsed = parse_args(script_argv(name))
        resolved = resolved_config(parsed)
        for key, text in flags.items():
            if "$" in text or key in ("evaluation_strategy", "warmup_ratio"):
                continue
            value = resolved[key]
            expected = {"True": True, "False": False}.get(text, text)
            if key == "gradient_checkpointing":
                expected = {"True": "full", "False": "none"}[text]
            assert (type(value)(expected) if not isinstance(value, bool) else expected) == value, key
        assert resolved["eval_strategy"] == "no"
        assert resolved["warmup_steps"] == 0.03

    def test_lora_values_have_their_types(self):
        parsed = parse_args(script_argv("scripts/v1_5/finetune_lora.sh"))
        flags = parsed.flags
        assert (flags.lora_enable, flags.lora_r, flags.lora_alpha) == (True, 128, 256)
        assert flags.mm_projector_lr == 2e-5
        assert parsed.inherited["learning_rate"] == 2e-4
        assert parsed.inherited["weight_decay"] == 0.0
        assert parsed.model.mm_vision_select_layer == -2
        assert parsed.data.image_aspect_ratio == "pad"
        assert flags.report_to == "wandb"
        assert parsed.inherited["deepspeed"] == "./scripts/zero3.json"

    def test_the_launcher_may_put_its_rank_first(self):
        for flag in (["--local_rank=1"], ["--local-rank", "1"]):
            parsed = parse_args([*flag, *script_argv("scripts/v1_5/pretrain.sh")])
            assert parsed.inherited["local_rank"] == 1
            assert "local_rank" not in resolved_config(parsed)


class TestCommandLine:
    def test_switches(self):
        assert parse("--lora_enable").flags.lora_enable
        assert parse("--lora_enable", "--bf16").inherited["bf16"] is True
        assert parse("--no_double_quant").flags.double_quant is False
        assert parse("--no-double-quant").flags.double_quant is False
        assert parse("--no_mm_use_im_patch_token").model.mm_use_im_patch_token is False

    @pytest.mark.parametrize("word", ["True", "true", "yes", "on", "1"])
    def test_words_for_true(self, word):
        assert parse("--image_exif_transpose", word).data.image_exif_transpose is True

    def test_equals_sign_and_dashes(self):
        assert parse("--lora-r=8").flags.lora_r == 8
        assert parse("--lora_weight_path=").flags.lora_weight_path == ""

    def test_negative_values(self):
        assert parse("--mm_vision_select_layer", "-2").model.mm_vision_select_layer == -2
        assert parse("--max_steps=-1").inherited["max_steps"] == -1

    def test_lists(self):
        expected = ["q_proj", "v_proj"]
        for value in (["q_proj", "v_proj"], ["q_proj,v_proj"]):
            assert parse("--lora_enable", "--lora_target_modules", *value).flags.lora_target_modules == expected
        assert parse("--lora_target_modules", "q_proj").flags.lora_target_modules == ["q_proj"]
        assert parse("--report_to", "wandb", "tensorboard").flags.report_to == ["wandb", "tensorboard"]

    def test_mappings(self):
        parsed = parse("--lr_scheduler_kwargs", '{"min_lr": 1e-6}')
        assert parsed.inherited["lr_scheduler_kwargs"] == {"min_lr": 1e-6}
        assert parse("--deepspeed", '{"zero_optimization": {"stage": 2}}').inherited["deepspeed"] == {
            "zero_optimization": {"stage": 2}
        }

    def test_none(self):
        assert parse("--vision_tower", "None").model.vision_tower is None
        assert parse("--mm_projector_lr", "none").flags.mm_projector_lr is None
        assert parse("--report_to", "none").flags.report_to == "none"

    def test_the_last_of_two_equal_flags_counts(self):
        assert parse("--lora_r", "8", "--lora_r", "16").flags.lora_r == 16

    def test_required_flags_depend_on_the_caller(self):
        parsed = parse_args(["--model_name_or_path", "m"], required=("model_name_or_path",))
        assert parsed.data.data_path is None
        assert parse_args([], required=()).model.model_name_or_path == ""


class TestYaml:
    def test_numbers_and_words_as_yaml_mangles_them(self, tmp_path):
        parsed = parse_yaml(
            tmp_path,
            "learning_rate: 2e-5\nmm_projector_lr: '2e-5'\nlora_r: '8'\nlora_enable: 'true'\nbf16: True\n"
            "eval_strategy: no\nsave_strategy: epoch\nweight_decay: 0.\nrun_name: 2024\nwarmup_steps: 0.03\n"
            "lr_scheduler_kwargs: {min_lr: 1e-6, n: 3}\nmm_vision_select_layer: -2\n",
        )
        assert parsed.inherited["learning_rate"] == 2e-5
        assert parsed.flags.mm_projector_lr == 2e-5
        assert (parsed.flags.lora_r, parsed.flags.lora_enable) == (8, True)
        assert parsed.inherited["bf16"] is True
        assert parsed.inherited["eval_strategy"] == "no"
        assert parsed.inherited["weight_decay"] == 0.0
        assert parsed.inherited["run_name"] == "2024"
        assert parsed.inherited["warmup_steps"] == 0.03
        assert parsed.inherited["lr_scheduler_kwargs"] == {"min_lr": 1e-6, "n": 3}
        assert parsed.model.mm_vision_select_layer == -2

    def test_lists_null_and_empty_file(self, tmp_path):
        parsed = parse_yaml(
            tmp_path,
            "lora_target_modules: [q_proj, v_proj]\nvision_tower: ~\nimage_folder:\nreport_to: [wandb]\n",
        )
        assert parsed.flags.lora_target_modules == ["q_proj", "v_proj"]
        assert parsed.model.vision_tower is None
        assert parsed.data.image_folder is None
        assert parsed.flags.report_to == ["wandb"]
        empty = tmp_path / "empty.yaml"
        empty.write_text("# nothing\n")
        assert parse_args(["--config", str(empty), *BASE]) == parse()

    def test_flags_override_wherever_they_stand(self, tmp_path):
        assert parse_yaml(tmp_path, "lora_r: 8\n", "--lora_r", "16").flags.lora_r == 16
        path = tmp_path / "run.yaml"
        assert parse_args(["--lora_r", "16", "--config", str(path)]).flags.lora_r == 16

    def test_an_old_spelling_overrides_the_new_one_and_the_other_way_round(self, tmp_path):
        parsed = parse_yaml(tmp_path, "warmup_steps: 100\n", "--warmup_ratio", "0.1")
        assert parsed.inherited["warmup_steps"] == 0.1
        parsed = parse_yaml(tmp_path, "warmup_ratio: 0.1\nevaluation_strategy: no\n", "--warmup_steps", "7")
        assert parsed.inherited["warmup_steps"] == 7

    def test_bare_names_are_looked_up(self, tmp_path, monkeypatch):
        by_name = parse_args(["--config", "lora"])
        assert by_name.flags.lora_r == 128
        assert parse_args(["--config", "lora.yaml"]) == by_name
        monkeypatch.chdir(tmp_path)
        assert parse_args(["--config", "lora.yaml"]) == by_name
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "lora.yaml").write_text("lora_r: 3\n")
        assert parse_args([*BASE, "--config", "lora"]).flags.lora_r == 3
        (tmp_path / "lora.yaml").write_text("lora_r: 4\n")
        assert parse_args([*BASE, "--config", "lora.yaml"]).flags.lora_r == 4


class TestOldSpellings:
    @pytest.mark.parametrize(
        ("argv", "key", "value"),
        [
            (["--evaluation_strategy", "no"], "eval_strategy", "no"),
            (["--warmup_ratio", "0.03"], "warmup_steps", 0.03),
            (["--warmup_ratio", "0.0"], "warmup_steps", 0),
            (["--warmup_ratio", "0.5", "--warmup_steps", "0"], "warmup_steps", 0.5),
            (["--warmup_ratio", "0.5", "--warmup_steps", "20"], "warmup_steps", 20),
            (["--group_by_length", "True"], "train_sampling_strategy", "group_by_length"),
            (["--no_cuda"], "use_cpu", True),
            (["--no_cuda", "False"], "use_cpu", False),
            (["--per_gpu_train_batch_size", "3"], "per_device_train_batch_size", 3),
            (["--per_gpu_eval_batch_size", "3"], "per_device_eval_batch_size", 3),
            (["--save_safetensors", "False"], "weights_format", "bin"),
            (["--save_safetensors", "True"], "weights_format", "auto"),
            (["--adafactor"], "optim", "adafactor"),
            (["--adafactor", "False"], "optim", None),
            (["--include_inputs_for_metrics"], "include_for_metrics", ["inputs"]),
            (["--push_to_hub_model_id", "a/b"], "hub_model_id", "a/b"),
            (["--torchdynamo", "eager"], "torch_compile_backend", "eager"),
            (["--activation_checkpointing"], "gradient_checkpointing", "full"),
            (["--gradient_checkpointing"], "gradient_checkpointing", "full"),
            (["--gradient_checkpointing", "True"], "gradient_checkpointing", "full"),
            (["--gradient_checkpointing", "selective"], "gradient_checkpointing", "selective"),
            (["--activation_checkpointing", "selective"], "gradient_checkpointing", "selective"),
            (
                ["--activation_checkpointing", "True", "--gradient_checkpointing", "full"],
                "gradient_checkpointing",
                "full",
            ),
            (["--gradient_checkpointing", "no"], "gradient_checkpointing", "none"),
            (["--no_gradient_checkpointing"], "gradient_checkpointing", "none"),
            (["--dispatch_batches", "True"], "accelerator_config", {"dispatch_batches": True}),
            (["--fsdp_min_num_params", "10"], "fsdp_config", {"min_num_params": 10}),
            (
                ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"],
                "fsdp_config",
                {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
            ),
            (["--tf32", "True"], "tf32", True),
        ],
    )
    def test_is_translated_to(self, argv, key, value):
        assert resolved_config(parse(*argv))[key] == value

    @pytest.mark.parametrize("total", [1, 7, 100, 5197, 2**20, 10**9])
    def test_a_warmup_ratio_of_one_is_all_steps(self, total):
        warmup = parse("--warmup_ratio", "1.0").inherited["warmup_steps"]
        assert isinstance(warmup, float)
        assert warmup < 1
        assert math.ceil(total * warmup) == total

    @pytest.mark.parametrize(
        "argv",
        [
            ["--use_mps_device", "False"],
            ["--fp16_backend", "auto"],
            ["--half_precision_backend", "auto"],
            ["--jit_mode_eval"],
            ["--past_index", "-1"],
            ["--ray_scope", "last"],
        ],
    )
    def test_without_effect_but_noted(self, argv):
        parsed = parse(*argv)
        assert parsed == parse()
        assert any(note.startswith(f"{argv[0][2:]} has no effect: ") for note in parsed.notes)

    def test_translations_are_noted(self):
        notes = parse("--evaluation_strategy", "no", "--warmup_ratio", "0.03").notes
        assert "evaluation_strategy is now called eval_strategy." in notes
        assert "warmup_ratio=0.03 is now warmup_steps=0.03 (below 1: a share of all steps)." in notes


class TestNotes:
    @pytest.mark.parametrize(
        ("argv", "note"),
        [
            (["--freeze_backbone", "--lora_enable"], "freeze_backbone has no effect with lora_enable"),
            (["--lora_r", "8"], "lora_r has no effect without lora_enable"),
            (["--quant_type", "fp4"], "quant_type has no effect with bits=16"),
            (["--mpt_attn_impl", "torch"], "mpt_attn_impl has no effect"),
            (
                ["--image_aspect_ratio", "pad", "--image_grid_pinpoints", "[[336, 672]]"],
                "image_grid_pinpoints has no effect without anyres",
            ),
            (
                ["--validation_fraction", "0.1", "--eval_strategy", "no"],
                "The validation records are never evaluated: eval_strategy=no.",
            ),
        ],
    )
    def test_idle_flag(self, argv, note):
        assert any(found.startswith(note) for found in parse(*argv).notes)

    def test_nothing_to_say_about_the_defaults(self):
        assert parse().notes == []

    def test_validation_records_are_evaluated(self):
        assert parse("--validation_fraction", "0.1").inherited["eval_strategy"] == "epoch"
        held_out = parse("--eval_strategy", "epoch", "--data_path", "mix.yaml")
        assert held_out.inherited["eval_strategy"] == "epoch"
        best = parse("--validation_fraction", "0.1", "--load_best_model_at_end", "--save_steps", "50").inherited
        assert (best["eval_strategy"], best["eval_steps"]) == ("steps", 50)


REFUSED_FLAGS = [
    (["--lora_rr", "8"], r"--lora_rr=8: there is no such flag. Did you mean lora_r\?"),
    (["--lora", "True"], r"--lora=True: there is no such flag"),
    (["--zzz"], r"--zzz: there is no such flag. Flags are those of LLaVA"),
    (["--lora_r", "big"], r"--lora_r=big: it is no int. Allowed: a whole number\."),
    (["--lora_r", "8.5"], r"--lora_r=8.5: it is no int"),
    (["--lora_r"], r"--lora_r needs a value. Allowed: a whole number"),
    (["--lora_r", "8", "16"], r"--lora_r=8 16: it has 2 values. Allowed: a whole number"),
    (["--learning_rate", "fast"], r"--learning_rate=fast: it is no float. Allowed: a number"),
    (["--learning_rate", "nan"], r"--learning_rate=nan: it is no float"),
    (["--learning_rate", "-1"], r"learning_rate=-1: must not be negative"),
    (["--bf16", "maybe"], r"--bf16=maybe: it is no bool. Allowed: true or false"),
    (["--bits", "5"], r"--bits=5: it is not in the list. Allowed: 4 \| 8 \| 16"),
    (["--bits", "4"], r"bits=4: quantised weights cannot be trained themselves. Add lora_enable"),
    (["--quant_type", "nf5"], r"--quant_type=nf5: .* Allowed: nf4 \| fp4. Did you mean nf4\?"),
    (["--lora_bias", "some"], r"--lora_bias=some: .* Allowed: none \| all \| lora_only"),
    (["--lora_enable", "--lora_r", "0"], r"lora_r=0: the rank must be at least 1"),
    (["--lora_enable", "--lora_alpha", "0"], r"lora_alpha=0: must be at least 1"),
    (["--lora_enable", "--lora_dropout", "1.0"], r"lora_dropout=1.0: allowed is at least 0 and below 1"),
    (
        ["--lora_enable", "--lora_target_modules", "model.layers.0"],
        r"lora_target_modules=model.layers.0: .*plain layer",
    ),
    (["--lora_enable", "--lora_target_modules", ","], r"lora_target_modules is empty"),
    (["--lora_weight_path", "a"], r"lora_weight_path=a needs lora_enable"),
    (
        ["--init_from", "a", "--lora_weight_path", "b", "--lora_enable"],
        r"init_from=a and lora_weight_path=b exclude each",
    ),
    (["--adapter_mode", "new"], r"adapter_mode=new says what becomes of the adapter in init_from, which is missing"),
    (["--init_from", "a", "--adapter_mode", "merge"], r"Allowed: continue \| new \| merge_first"),
    (
        ["--lora_weight_path", "a", "--lora_enable", "--adapter_mode", "new"],
        r"adapter_mode=new and lora_weight_path=a exclude each other.* Write init_from=a",
    ),
    (["--init_from", "a", "--pretrain_mm_mlp_adapter", "b"], r"init_from=a and pretrain_mm_mlp_adapter=b exclude each"),
    (
        ["--init_from", "a", "--adapter_mode", "merge_first", "--lora_enable", "--bits", "4"],
        r"adapter_mode=merge_first and bits=4 exclude each other",
    ),
    (["--lora_enable", "--tune_mm_mlp_adapter"], r"lora_enable and tune_mm_mlp_adapter exclude each other"),
    (
        ["--tune_mm_mlp_adapter", "--freeze_mm_mlp_adapter"],
        r"freeze_mm_mlp_adapter and tune_mm_mlp_adapter exclude each other",
    ),
    (["--freeze_backbone", "--freeze_mm_mlp_adapter"], r"leave nothing to train"),
    (["--mm_vision_select_feature", "cls"], r"Allowed: patch \| cls_patch \| null"),
    (["--image_aspect_ratio", "anyres_max_0"], r"image_aspect_ratio=anyres_max_0: unknown.*anyres_max_N"),
    (["--preprocessing_num_workers", "0"], r"preprocessing_num_workers=0: must be at least 1"),
    (["--packing", "--padding_free"], r"packing and padding_free exclude each other"),
    (["--gradient_checkpointing", "most"], r"none | full | selective | true \(which is full\)"),
    (["--gradient_checkpointing", "full", "--gradient_checkpointing_every", "0"], r"_every=0: must be at least 1"),
    (["--activation_offload"], r"activation_offload with gradient_checkpointing=none.*Add gradient_checkpointing=full"),
    (["--activation_offload", "--gradient_checkpointing", "selective"], r"with gradient_checkpointing=selective"),
    (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], r"use_reentrant=true loses.*Only false"),
    (["--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'], r"every_n_layers.*use gradient_checkpointing_every"),
    (["--gradient_checkpointing_kwargs", '{"debug": true}'], r"has debug. Allowed are determinism_check, early_stop"),
    (["--length_multiple", "-1"], r"length_multiple=-1: must not be negative. Give 0 for no filling up, or 128"),
    (["--packing", "--group_by_modality_length"], r"packing and group_by_modality_length exclude.*--no_group_by"),
    (["--packing", "--train_sampling_strategy", "group_by_length"], r"packing and train_sampling_strategy=group_by"),
    (["--packing", "--train_sampling_strategy", "sequential"], r"packing and train_sampling_strategy=sequential"),
    (["--image_aspect_ratio", "sqare"], r"image_aspect_ratio=sqare: unknown. Allowed: square, pad"),
    (["--image_grid_pinpoints", "[[336]]"], r"image_grid_pinpoints is '\[\[336\]\]'; it must be sizes of width and"),
    (["--image_grid_pinpoints", "(1x1),...,(9"], r"image_grid_pinpoints is .*the range '\(1x1\),...,\(3x3\)'"),
    (["--s2_scales", "336;672"], r"s2_scales is '336;672'; it must be sides in pixels with commas"),
    (
        ["--s2_scales", "336,672", "--image_aspect_ratio", "anyres"],
        r"s2_scales=336,672 and .*anyres exclude each",
    ),
    (
        ["--image_aspect_ratio", "anyres_max_9", "--mm_patch_merge_type", "flat"],
        r"image_aspect_ratio=anyres_max_9 .* needs mm_patch_merge_type=spatial_unpad, which is flat",
    ),
    (["--pretrain_mm_mlp_adapter", ""], r"pretrain_mm_mlp_adapter is empty"),
    (["--attn_implementation", "flash"], r"Allowed: auto \| flash_attention_3 \| flash_attention_2 \| varlen"),
    (["--validation_fraction", "1.0"], r"validation_fraction=1.0: allowed is at least 0 and below 1"),
    (
        ["--validation_fraction", "0.1", "--validation_data_path", "v"],
        r"validation_fraction=0.1 and validation_data_path=v exclude each other",
    ),
    (
        ["--eval_strategy", "steps"],
        r"eval_strategy=steps needs records to evaluate on. Add validation_data_path",
    ),
    (
        ["--eval_strategy", "steps", "--data_path", "a.json"],
        r"Add validation_data_path or validation_fraction, or held_out to a mixture; or set",
    ),
    (["--eval_strategy", "sometimes"], r"Allowed: no \| steps \| epoch"),
    (["--load_best_model_at_end"], r"load_best_model_at_end needs an evaluation"),
    (["--save_strategy", "best"], r"save_strategy=best needs an evaluation"),
    (
        ["--load_best_model_at_end", "--validation_fraction", "0.1", "--eval_strategy", "epoch"],
        r"save_strategy=steps and eval_strategy=epoch differ",
    ),
    (
        [
            "--load_best_model_at_end",
            "--validation_fraction",
            "0.1",
            "--eval_strategy",
            "steps",
            "--eval_steps",
            "30",
            "--save_steps",
            "50",
        ],
        r"save_steps=50 is no multiple of eval_steps=30",
    ),
    (["--bf16", "--fp16"], r"bf16 and fp16 exclude each other"),
    (
        ["--group_by_modality_length", "--train_sampling_strategy", "sequential"],
        r"group_by_modality_length and train_sampling_strategy=sequential exclude each other",
    ),
    (["--group_by_modality_length", "--group_by_length"], r"train_sampling_strategy=group_by_length exclude"),
    (["--train_sampling_strategy", "batch_rebalance"], r"Allowed: random \| sequential \| group_by_length"),
    (["--max_steps", "0"], r"max_steps=0: must be at least 1, or -1"),
    (["--num_train_epochs", "0"], r"num_train_epochs=0: must be above 0 unless max_steps is given"),
    (["--per_device_train_batch_size", "0"], r"per_device_train_batch_size=0: must be at least 1"),
    (["--gradient_accumulation_steps", "0"], r"gradient_accumulation_steps=0: must be at least 1"),
    (["--save_steps", "1.5"], r"save_steps=1.5: give a whole number from 1, or a share"),
    (["--logging_steps", "0"], r"logging_steps=0: give a whole number"),
    (["--model_max_length", "0"], r"model_max_length=0: must be at least 1 token"),
    (["--bad_sample_limit", "2"], r"bad_sample_limit=2.0: a share between 0 and 1"),
    (["--mm_projector_lr", "-1"], r"mm_projector_lr=-1.0: must not be negative"),
    (["--remove_unused_columns", "True"], r"remove_unused_columns=True would take"),
    (["--optim", "adam"], r"--optim=adam: it is not in the list"),
    (["--warmup_ratio", "1.5"], r"warmup_ratio=1.5: a share of all steps lies between 0 and 1"),
    (["--warmup_ratio", "x"], r"--warmup_ratio=x: it is no float"),
    (["--overwrite_output_dir", "x"], r"--overwrite_output_dir=x: it is no bool"),
    (
        ["--evaluation_strategy", "no", "--eval_strategy", "steps"],
        r"--evaluation_strategy=no contradicts eval_strategy=steps",
    ),
    (
        ["--group_by_length", "--train_sampling_strategy", "sequential"],
        r"group_by_length contradicts train_sampling_strategy=sequential",
    ),
    (["--lr_scheduler_kwargs", "{min_lr}"], r"it is no valid JSON"),
    (["--version", ""], r"--version.*vicuna_v1"),
    (["--config", "no_such"], r"--config no_such: there is no such file. .* finetune.yaml, lora.yaml"),
    (["--config", "no/such.yaml"], r"--config no/such.yaml: there is no such file"),
    (["--config", "no/lora.yaml"], r"--config no/lora.yaml: there is no such file"),
    (["--config"], r"--config needs one file name"),
    (["--config", "lora", "--config", "pretrain"], r"--config was given twice"),
    (["--print-config", "perhaps"], r"--print-config=perhaps: it is no bool"),
    (
        ["--dispatch_batches", "True", "--accelerator_config", "a.json"],
        r"dispatch_batches beside accelerator_config='a.json'",
    ),
]

REFUSED_YAML = [
    ("lora_rr: 8\n", r"run.yaml, line 4: lora_rr=8: there is no such flag. Did you mean lora_r\?"),
    ("lora_r: 8\nlora_r: 16\n", r"run.yaml, line 5: lora_r was given in line 4 already"),
    ("lora_r: [8, 16]\n", r"line 4: lora_r=8 16: it has 2 values"),
    ("lora_r: {a: 1}\n", r"line 4: lora_r=\{'a': 1\}: it is a mapping"),
    ("lora_r:\n", r"line 4: lora_r=null: it has no value. Allowed: a whole number"),
    ("lora_r: 8: 9\n", r"run.yaml, line 4: not valid YAML: mapping values are not allowed here"),
    ("lora_r: 'x\n", r"not valid YAML"),
    ("lora_r: 8\x01\n", r"not valid YAML: unacceptable character #x0001"),
    ("? [a, b]\n: 8\n", r"line 4: the key is a sequence. Keys are flag names"),
    ("report_to: [[wandb]]\n", r"line 4: a list may hold single values only"),
    ("config: other.yaml\n", r"line 4: config belongs on the command line"),
    ("print_config: true\n", r"line 4: print_config belongs on the command line"),
    ("training:\n  lora_r: 8\n", r"line 4: training=\{'lora_r': 8\}: there is no such flag"),
    ("parallelism_config: x\n", r"line 4: parallelism_config=x: there is no such flag"),
    (
        "lr_scheduler_kwargs: {a: !!python/name:os.system x}\n",
        r"not valid YAML: could not determine a constructor",
    ),
]


class TestRefusals:
    @pytest.mark.parametrize(("argv", "message"), REFUSED_FLAGS)
    def test_flags(self, argv, message):
        with pytest.raises(UserError, match=message):
            parse(*argv)

    @pytest.mark.parametrize(("text", "message"), REFUSED_YAML)
    def test_yaml(self, tmp_path, text, message):
        with pytest.raises(UserError, match=message):
            parse_yaml(tmp_path, text)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"- a\n- b\n", "is a sequence, not a mapping"),
            (b"just words\n", "is a scalar, not a mapping"),
            (b"\xff\xfe\x00", "is not UTF-8 text"),
            (b"a: 1\n---\nb: 2\n", "not valid YAML: but found another document"),
        ],
    )
    def test_files_that_are_no_mapping(self, tmp_path, content, message):
        path = tmp_path / "run.yaml"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            parse_args(["--config", str(path)])

    @pytest.mark.parametrize("name", ["model_name_or_path", "data_path", "output_dir"])
    def test_missing(self, name):
        argv = [word for pair in zip(BASE[::2], BASE[1::2], strict=True) if pair[0] != f"--{name}" for word in pair]
        with pytest.raises(UserError, match=f"{name} is missing. It has no default; give --{name} VALUE"):
            parse_args(argv)

    def test_a_word_without_a_flag(self):
        with pytest.raises(UserError, match=r"Unexpected argument 'lora.yaml'.*write --config lora.yaml"):
            parse_args(["lora.yaml"])

    def test_null_for_a_required_flag(self):
        with pytest.raises(UserError, match="data_path is missing"):
            parse("--data_path", "None")

    def test_an_unknown_template(self):
        with pytest.raises(UserError, match=r"v1x.*Did you mean 'v1'\?.*vicuna_v1"):
            parse("--version", "v1x")


class TestPrintConfig:
    @pytest.mark.parametrize("name", sorted(CLI["scripts"]))
    def test_round_trip(self, name, tmp_path):
        parsed = parse_args(script_argv(name))
        path = tmp_path / "resolved.yaml"
        path.write_text(to_yaml(parsed))
        again = parse_args(["--config", str(path)])
        assert again == parsed
        assert again.notes == []
        assert to_yaml(again) == to_yaml(parsed)

    @pytest.mark.parametrize(
        "argv",
        [
            ["--lora_target_modules", "q_proj", "--lora_enable", "--report_to", "wandb", "tensorboard"],
            ["--run_name", "123", "--image_folder", "null ", "--vision_tower", "~", "--hub_model_id", "yes"],
            ["--lr_scheduler_kwargs", '{"min_lr": 1e-6, "x": "1e-6"}', "--warmup_ratio", "1.0"],
            ["--deepspeed", '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}'],
            ["--include_num_input_tokens_seen", "no", "--label_names", "labels", "--fsdp"],
            ["--save_steps", "0.1", "--validation_fraction", "0.25", "--learning_rate", "1e-10"],
        ],
    )
    def test_round_trip_of_awkward_values(self, argv, tmp_path):
        parsed = parse(*argv)
        path = tmp_path / "resolved.yaml"
        path.write_text(to_yaml(parsed))
        again = parse_args(["--config", str(path)])
        assert again == parsed
        assert resolved_config(again) == resolved_config(parsed)

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        folder=TEXTS,
        run_name=TEXTS,
        rate=st.floats(0, 1e3),
        labels=st.lists(TEXTS.filter(bool), min_size=2, max_size=3),
    )
    def test_round_trip_of_any_text(self, tmp_path, folder, run_name, rate, labels):
        argv = ["--image_folder", folder, "--run_name", run_name, "--learning_rate", repr(rate)]
        parsed = parse(*argv, "--label_names", *labels)
        path = tmp_path / "resolved.yaml"
        path.write_text(to_yaml(parsed), encoding="utf-8", newline="")
        assert parse_args(["--config", str(path)]) == parsed

    def test_states_every_own_flag_and_no_secret(self):
        resolved = resolved_config(parse("--hub_token", "secret"))
        assert set(resolved) >= OWN_FLAGS
        assert "hub_token" not in resolved
        assert yaml.safe_load(to_yaml(parse())) == resolved_config(parse())

    def test_touches_neither_files_nor_heavy_libraries(self, tmp_path):
        argv = [*script_argv("scripts/v1_5/finetune_lora.sh"), "--print-config"]
        code = (
            "import sys\n"
            "from llava_ft.args import parse_args, to_yaml\n"
            "parsed = parse_args(sys.argv[1:])\n"
            "assert parsed.print_config\n"
            "sys.stdout.write(to_yaml(parsed))\n"
            "heavy = {'torch', 'transformers', 'deepspeed', 'peft', 'accelerate'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout)["lora_r"] == 128
        assert list(tmp_path.iterdir()) == []


class TestBuild:
    def test_a_machine_without_a_gpu(self):
        wanted = {
            "tf32": True,
            "fp16": True,
            "fp16_full_eval": True,
            "optim": "adamw_torch_fused",
            "ddp_backend": "nccl",
        }
        values, notes = adapt_to_device(wanted, has_cuda=False, has_tf32=False)
        assert values == {
            "tf32": None,
            "fp16": False,
            "fp16_full_eval": False,
            "optim": "adamw_torch",
            "ddp_backend": "gloo",
            "use_cpu": True,
        }
        assert len(notes) == 5
        assert notes[0] == "tf32 is ignored: there is no GPU."
        assert wanted["tf32"] is True

    @pytest.mark.parametrize(
        ("paged", "instead"),
        [
            ("paged_adamw_8bit", "adamw_8bit"),
            ("paged_adamw_32bit", "adamw_torch"),
            ("paged_lion_8bit", "lion_8bit"),
            ("paged_lion_32bit", "lion_32bit"),
            ("paged_ademamix_8bit", "ademamix_8bit"),
            ("paged_ademamix_32bit", "ademamix"),
        ],
    )
    def test_a_cpu_has_nothing_to_page(self, paged, instead):
        values, notes = adapt_to_device({"optim": paged}, has_cuda=False, has_tf32=False)
        assert values["optim"] == instead
        assert notes == [f"optim={paged} is replaced by {instead}: there is no GPU."]
        assert adapt_to_device({"optim": paged}, has_cuda=True, has_tf32=True) == ({"optim": paged}, [])
        assert {paged, instead} <= {name.value for name in OptimizerNames}

    @pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_32bit"])
    def test_an_optimizer_of_bitsandbytes_needs_it(self, optim, monkeypatch):
        monkeypatch.setattr("llava_ft.args.build._is_installed", lambda package: package != "bitsandbytes")
        with pytest.raises(UserError, match=r"needs bitsandbytes, .* pip install llava-ft\[qlora\], or use optim=ada"):
            _ = parse("--optim", optim).training

    def test_bf16_works_on_a_cpu(self):
        assert adapt_to_device({"bf16": True}, has_cuda=False, has_tf32=False) == (
            {"bf16": True, "use_cpu": True},
            [],
        )

    def test_the_device_decides_which_adamw_it_is(self):
        assert adapt_to_device({"optim": None}, has_cuda=True, has_tf32=True)[0]["optim"] == "adamw_torch_fused"
        on_cpu = adapt_to_device({"optim": None}, has_cuda=False, has_tf32=False)
        assert on_cpu == ({"optim": "adamw_torch", "use_cpu": True}, [])
        asked_for_cpu = {"optim": None, "use_cpu": True}
        assert adapt_to_device(asked_for_cpu, has_cuda=True, has_tf32=True)[0]["optim"] == "adamw_torch"
        given = {"optim": "adamw_torch"}
        assert adapt_to_device(given, has_cuda=True, has_tf32=True)[0] == given

    def test_batches_are_copied_to_a_gpu_without_waiting_unless_told_to_wait(self):
        values: dict = {}
        _copy_batches_without_waiting(values)
        assert values["accelerator_config"] == {"non_blocking": True}
        values = {"accelerator_config": {"non_blocking": False, "even_batches": True}}
        _copy_batches_without_waiting(values)
        assert values["accelerator_config"] == {"non_blocking": False, "even_batches": True}
        for others in ({"use_cpu": True}, {"dataloader_pin_memory": False}, {"accelerator_config": "file.json"}):
            values = dict(others)
            _copy_batches_without_waiting(values)
            assert values == others

    @pytest.mark.parametrize(("wish", "precision"), [(True, "tf32"), (False, "ieee")])
    def test_tf32_reaches_products_and_convolutions(self, tmp_path, monkeypatch, wish, precision):
        monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
        monkeypatch.setattr(torch.backends, "fp32_precision", torch.backends.fp32_precision)  # taken back afterwards
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, tf32=wish)
        assert torch.backends.cuda.matmul.fp32_precision == precision
        assert torch.backends.cudnn.conv.fp32_precision == precision

    def test_a_gpu_keeps_everything(self):
        wanted = {"tf32": True, "fp16": True, "optim": "adamw_torch_fused"}
        assert adapt_to_device(wanted, has_cuda=True, has_tf32=True) == (wanted, [])

    def test_an_old_gpu_and_a_gpu_that_is_not_wanted(self):
        values, notes = adapt_to_device({"tf32": True, "fp16": True}, has_cuda=True, has_tf32=False)
        assert (values["tf32"], values["fp16"]) == (None, True)
        assert notes == ["tf32 is ignored: the GPU has none."]
        values, notes = adapt_to_device({"tf32": True, "use_cpu": True}, has_cuda=True, has_tf32=True)
        assert notes == ["tf32 is ignored: the CPU is used."]

    @pytest.mark.filterwarnings("error::FutureWarning")
    def test_the_published_lora_line_without_deepspeed(self, tmp_path):
        argv = script_argv("scripts/v1_5/finetune_lora.sh")
        argv = [*argv[: argv.index("--deepspeed")], *argv[argv.index("--deepspeed") + 2 :]]
        parsed = parse_args([*argv, "--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"])
        training = parsed.training
        assert isinstance(training, TrainingArguments)
        assert training is parsed.training
        assert (training.lora_r, training.learning_rate, training.warmup_steps) == (128, 2e-4, 0.03)
        assert training.get_warmup_steps(1000) == 30
        assert training.bf16
        assert training.tf32 is None
        assert training.use_cpu
        assert parsed.flags.gradient_checkpointing == "full"
        assert parsed.flags.gradient_checkpointing_kwargs == {"use_reentrant": False}
        assert training.optim == "adamw_torch"
        assert training.remove_unused_columns is False
        assert training.logging_nan_inf_filter is False
        assert training.prediction_loss_only is True
        assert parsed.attn_implementation == "sdpa"

    @pytest.mark.filterwarnings("error::FutureWarning")
    @pytest.mark.parametrize("mode", ["none", "full", "selective"])
    def test_transformers_is_not_to_recompute_itself(self, tmp_path, mode):
        training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=mode)
        assert training.gradient_checkpointing is False
        assert getattr(training, "activation_checkpointing", False) is False

    def test_a_secret_is_not_shown(self, tmp_path):
        training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_token="secret")
        assert "secret" not in repr(training)

    @pytest.mark.parametrize(
        ("name", "known"), [("torch_compile_backend", "aot_eager, .*inductor"), ("torch_compile_mode", "max-autotune")]
    )
    def test_a_compiler_that_torch_does_not_have_is_refused(self, name, known):
        with pytest.raises(UserError, match=rf"{name}=x: torch has none of that name. Allowed here: .*{known}"):
            _ = parse(f"--{name}", "x").training

    def test_what_transformers_refuses_is_a_user_error(self, tmp_path):
        parsed = parse("--output_dir", str(tmp_path), "--use_cpu", "--dataloader_prefetch_factor", "2")
        with pytest.raises(UserError, match=r"transformers refuses these training arguments: --dataloader_prefetch"):
            _ = parsed.training

    def test_an_unknown_key_inside_a_mapping_is_a_user_error(self, tmp_path):
        parsed = parse("--output_dir", str(tmp_path), "--use_cpu", "--accelerator_config", '{"x": 1}')
        with pytest.raises(UserError, match=r"transformers refuses these training arguments: .*'x'"):
            _ = parsed.training

    def test_is_saved_and_loaded_whole(self, tmp_path):
        training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, lora_target_modules=["q_proj"])
        assert pickle.loads(pickle.dumps(training)).lora_target_modules == ["q_proj"]
        assert json.loads(training.to_json_string())["lora_r"] == 64

    def test_attention_on_a_cpu(self, tmp_path):
        def chosen(requested: str) -> tuple[str, list[str]]:
            parsed = parse("--output_dir", str(tmp_path), "--use_cpu", "--attn_implementation", requested)
            return parsed.attn_implementation, [note for note in parsed.notes if "attn_implementation" in note]

        assert chosen("eager") == ("eager", [])
        assert chosen("auto") == ("sdpa", ["attn_implementation=auto takes sdpa: there is no GPU."])
        replaced = "attn_implementation=varlen is replaced by sdpa: it needs a GPU."
        assert chosen("varlen") == ("sdpa", [replaced])

    def test_a_reporter_that_is_not_installed_is_left_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr("llava_ft.args.build._is_installed", lambda name: name != "wandb")
        parsed = parse("--output_dir", str(tmp_path), "--use_cpu", "--report_to", "wandb")
        assert parsed.training.report_to == []
        assert any(note.startswith("report_to=wandb is left out: it is not installed.") for note in parsed.notes)

    def test_deepspeed_that_is_not_installed(self, monkeypatch):
        monkeypatch.setattr("llava_ft.args.build._is_installed", lambda name: name != "deepspeed")
        with pytest.raises(UserError, match=r"DeepSpeed is not installed. Install it with pip install deepspeed"):
            _ = parse("--deepspeed", "zero2.json").training

    def test_deepspeed_files_are_found_by_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        notes: list[str] = []
        assert read_deepspeed_config("./scripts/zero3.json", notes)[1] == str(REPO / "configs" / "zero3.json")
        assert notes[0].startswith("deepspeed=./scripts/zero3.json is taken from ")
        own = tmp_path / "mine.json"
        own.write_text("{}")
        assert read_deepspeed_config(str(own), notes)[1] == str(own)
        assert len(notes) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"there is no such file. .*zero2.json, zero2_offload.json"),
            ("{", "cannot be read: Expecting property name"),
            ("[]", "holds no JSON object"),
        ],
    )
    def test_deepspeed_files_that_cannot_be_used(self, tmp_path, content, message):
        path = tmp_path / "ds.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_deepspeed_config(str(path), [])


class Letter(enum.Enum):
    X = "x"


class TestTypes:
    @pytest.mark.parametrize(
        ("hint", "expected"),
        [
            (typing.Literal["a", "b"] | None, ValueType(frozenset({"str"}), ("a", "b"), optional=True)),
            (Letter | str, ValueType(frozenset({"str"}), ("x",))),
            (typing.Union[str, None, typing.Literal[False]], ValueType(frozenset({"str", "bool"}), optional=True)),  # noqa: UP007
            (typing.Literal[4, 8], ValueType(frozenset({"int"}), (4, 8))),
            (str | list[Letter], ValueType(frozenset({"str", "list"}))),
        ],
    )
    def test_of_a_hint(self, hint, expected):
        assert ValueType.of(hint) == expected

    def test_of_an_object(self):
        with pytest.raises(TypeError, match="a flag cannot hold"):
            ValueType.of(Path | None)

    def test_a_text_is_not_taken_for_a_boolean(self):
        either = ValueType(frozenset({"str", "bool"}))
        assert [either.convert(text) for text in ("no", "1", "true", "False")] == ["no", "1", True, False]

    def test_infinity_is_no_number(self):
        with pytest.raises(ConversionError):
            ValueType(frozenset({"float"})).convert("inf")
