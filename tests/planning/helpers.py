"""Small models and requests to plan for."""

import json
from pathlib import Path

from torch import nn

from llava_ft.args import parse_args
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.planning.plan import Plan, make_plan
from llava_ft.planning.request import PlanRequest, plan_machine, plan_request
from llava_ft.resolve import RunModel, resolve_model

GPU_7B = ["--model_name_or_path", "liuhaotian/llava-v1.5-7b", "--bf16", "True"]
LORA = ["--lora_enable", "True", "--lora_r", "128", "--lora_alpha", "256"]
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
TINY_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}


def write_configs(folder: Path) -> list[str]:
    """Write a language model and a tower of which there is nothing but config.json; return the flags that name them."""
    for name, fields in (("llm", TINY_LLAMA), ("clip", TINY_CLIP)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(fields))
    return [
        *("--model_name_or_path", str(folder / "llm"), "--vision_tower", str(folder / "clip")),
        *("--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2", "--model_max_length", "64"),
        *("--per_device_train_batch_size", "2"),
    ]


def request_of(argv: list[str], *, gpus: int = 1, nodes: int = 1) -> tuple[RunModel, PlanRequest]:
    """Read a request from flags."""
    args = parse_args(argv, required=("model_name_or_path",))
    outline = resolve_model(args, need="config")
    machine = plan_machine(args.inherited, gpus=gpus, nodes=nodes, gpu_memory="24GiB")
    request = plan_request(outline, machine)
    return outline, request


def plan_of(argv: list[str], *, gpus: int = 1, nodes: int = 1, gpu_memory: str = "24GiB") -> Plan:
    """Plan a run from flags."""
    args = parse_args(argv, required=("model_name_or_path",))
    return make_plan(args, plan_machine(args.inherited, gpus=gpus, nodes=nodes, gpu_memory=gpu_memory))


def native_model(model: nn.Module) -> LlavaForCausalLM:
    """Return the LLaVA model inside what PEFT wraps around it."""
    return next(module for module in model.modules() if isinstance(module, LlavaForCausalLM))
