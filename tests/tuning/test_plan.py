"""The table of what is trained: filled in from the original's flags, and read by groups, dtypes and files."""

import pytest
import torch
from torch import nn

from llava_ft.checkpoint.save import result_kind
from llava_ft.errors import UserError
from llava_ft.models.parts import part_of
from llava_ft.training.optim import parameter_groups
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.plan import PartPlan, TuningPlan
from tests.models.test_forward import load

NAMES = {
    "model.embed_tokens.weight": 2,
    "model.layers.0.self_attn.q_proj.weight": 2,
    "model.layers.1.self_attn.q_proj.weight": 2,
    "model.norm.weight": 1,
    "lm_head.weight": 2,
    "model.mm_projector.0.weight": 2,
    "model.mm_projector.0.bias": 1,
    "model.image_newline": 1,
    "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight": 2,
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": 2,
    "model.embed_tokens.new_rows": 2,
}
FLAGS = ("lora_enable", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_backbone")
PROJECTOR = {"projector", "image newline"}
LANGUAGE_MODEL = {"embeddings", "language model", "head"}


def plan_of(*given: str, has_vision: bool = True, mm_projector_lr: float | None = None) -> TuningPlan:
    flags = {flag: flag in given for flag in FLAGS}
    return TuningPlan.from_flags(**flags, has_vision=has_vision, mm_projector_lr=mm_projector_lr)


@pytest.mark.parametrize(
    ("flags", "has_vision", "trained", "new_rows", "written"),
    [
        ((), True, LANGUAGE_MODEL | PROJECTOR, set(), "full"),
        ((), False, LANGUAGE_MODEL, set(), "full"),
        (("freeze_mm_mlp_adapter",), True, LANGUAGE_MODEL, set(), "full"),
        (("freeze_backbone",), True, PROJECTOR, set(), "full"),
        (("tune_mm_mlp_adapter",), True, PROJECTOR, {"embeddings"}, "projector"),
        (("tune_mm_mlp_adapter", "freeze_backbone"), True, PROJECTOR, {"embeddings"}, "projector"),
        (("lora_enable",), True, PROJECTOR, {"embeddings", "head"}, "lora"),
        (("lora_enable",), False, set(), {"embeddings", "head"}, "lora"),
        (("lora_enable", "freeze_mm_mlp_adapter"), True, set(), {"embeddings", "head"}, "lora"),
    ],
)
def test_what_the_flags_train_and_which_files_hold_it(flags, has_vision, trained, new_rows, written):
    plan = plan_of(*flags, has_vision=has_vision)
    assert {part_of(name) for name in NAMES if plan.trains(name)} == {*trained, "LoRA", "new token rows"}
    assert (plan.new_rows, plan.has_lora, result_kind(plan)) == (new_rows, "lora_enable" in flags, written)
    for name in NAMES:
        held_as = plan.dtype_of(name, torch.bfloat16)
        assert held_as == (torch.float32 if plan.trains(name) else torch.bfloat16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("tune_mm_mlp_adapter",), "trains the projector, but the model is text-only"),
        (("freeze_backbone",), "freeze_backbone leaves nothing to train"),
    ],
)
def test_a_run_without_anything_to_train_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        plan_of(*flags, has_vision=False)


def test_an_adapter_elsewhere_than_in_the_language_model_is_refused():
    with pytest.raises(UserError, match="LoRA is for the language model; vision tower can be frozen"):
        TuningPlan({"vision tower": PartPlan("lora")})


def test_layers_outside_a_range_stay_fixed():
    plan = TuningPlan({"language model": PartPlan("full", layers=range(1, 2)), "vision tower": PartPlan("full")})
    trained = [name for name in NAMES if plan.trains(name) and part_of(name) not in ("LoRA", "new token rows")]
    assert trained == [name for name in NAMES if ".layers.1." in name]


@pytest.mark.parametrize("part", ["vision tower", "embeddings"])
def test_a_whole_model_has_no_place_for_rows_of_their_own(part):
    parts = {"projector": PartPlan("full"), part: PartPlan("full")}
    assert result_kind(TuningPlan(parts)) == "full"
    with pytest.raises(UserError, match="beside LoRA or with a projector alone"):
        TuningPlan(parts, plan_of("tune_mm_mlp_adapter").new_rows)


class TestGroups:
    def groups(self, plan: TuningPlan) -> list[tuple[list[str], float, float]]:
        model = nn.Module()
        for name, num_dimensions in NAMES.items():
            owner = model
            *steps, last = name.split(".")
            for step in steps:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            as_peft_marks_it = part_of(name) == "LoRA"
            owner.register_parameter(last, nn.Parameter(torch.zeros((2,) * num_dimensions), as_peft_marks_it))
        plan.apply(model)
        groups = parameter_groups(model, plan, learning_rate=1e-3, weight_decay=0.1)
        assert {name for group in groups for name in group["names"]} == set(filter(plan.trains, NAMES))
        return [(sorted({part_of(n) for n in g["names"]}), g["lr"], g["weight_decay"]) for g in groups]

    def test_the_projector_has_a_rate_of_its_own_and_only_matrices_decay(self):
        assert self.groups(plan_of("lora_enable", mm_projector_lr=1e-4)) == [
            (["LoRA", "new token rows"], 1e-3, 0.1),
            (["image newline"], 1e-3, 0.0),
            (["projector"], 1e-4, 0.1),
            (["projector"], 1e-4, 0.0),
        ]

    def test_without_it_there_is_one_rate(self):
        matrices, vectors = self.groups(plan_of("lora_enable"))
        assert matrices == (["LoRA", "new token rows", "projector"], 1e-3, 0.1)
        assert vectors == (["image newline", "projector"], 1e-3, 0.0)

    def test_a_part_may_have_its_own_decay(self):
        plan = TuningPlan({"projector": PartPlan("full", weight_decay=0.5), "head": PartPlan("full")})
        assert self.groups(plan)[:2] == [
            (["LoRA", "head", "new token rows"], 1e-3, 0.1),
            (["projector"], 1e-3, 0.5),
        ]


@pytest.mark.usefixtures("in_recordings")
def test_adapters_lie_in_the_layers_asked_for():
    model = add_lora(load("ckpt/llava15-tiny", "sdpa"), r=2, alpha=4, dropout=0.0, layers=range(1, 2))
    adapted = [name for name, _ in model.named_parameters() if part_of(name) == "LoRA"]
    assert adapted
    assert all(".layers.1." in name and "vision" not in name for name in adapted)
