"""Tiny checkpoints of transformers' own layout, written by transformers and PEFT themselves.

Nothing here uses `llava_ft`, except for the adapter that PEFT trains on a model in the native layout.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

Model = Literal["llava", "llava_next"]
Files = Literal["today", "hub", "modules"]
"""How a directory is written: by `save_pretrained` of the installed transformers; as the checkpoints on the hub are,
with `vision_tower.vision_model.*`, defaults left out of the configuration and a `preprocessor_config.json`; or with
the names of the modules, as tools do that save a state dictionary."""
Target = Literal["attention", "projector beside", "all-linear"]
"""What an adapter is trained on: a list of leaf names, which the tower has too; attention of the language model, with
the projector in `modules_to_save`; or every linear layer, in tower and projector too."""

TOKENIZER = Path(__file__).parents[1] / "golden/tokenizers/tiny512"
SIDE, PATCH, NUM_ROWS = 56, 14, 520
PINPOINTS_HW = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.12,
    "vocab_size": NUM_ROWS,
}
_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 32,
    "initializer_range": 0.12,
}
_HUB_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)


def load_hf(directory: Path) -> Any:
    """Load a directory with plain transformers, in float32."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    model_class = LlavaForConditionalGeneration if kind == "llava" else LlavaNextForConditionalGeneration
    return model_class.from_pretrained(directory, dtype=torch.float32).eval()


def write_hf(
    directory: Path, model: Model = "llava", files: Files = "today", *, pads: bool = False, num_shards: int = 1
) -> None:
    """Write a model with random weights.

    Args:
        directory: Where; made if it does not exist.
        model: Which of the two models.
        files: Which version of names and files.
        pads: Whether `llava`'s processor pads images to a square.
        num_shards: Over how many files the weights are spread, except by `save_pretrained`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = hf_tokenizer()
    given: dict[str, Any] = {
        "text_config": _TEXT,
        "vision_config": _VISION,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": (SIDE // PATCH) ** 2,
    }
    if model == "llava_next":
        given["image_grid_pinpoints"] = PINPOINTS_HW
    torch.manual_seed(0)
    config = LlavaConfig(**given) if model == "llava" else LlavaNextConfig(**given)
    made: Any = (LlavaForConditionalGeneration if model == "llava" else LlavaNextForConditionalGeneration)(config)
    _spread(made)
    _processor(model, tokenizer, pads).save_pretrained(directory)
    if files == "today":
        made.save_pretrained(directory)
        return
    made.config.save_pretrained(directory)
    state = {name: value.contiguous() for name, value in made.state_dict().items()}
    if files == "hub":
        state = {_hub_name(name): value for name, value in state.items()}
        _write_files_as_on_the_hub(directory, model, given, pads)
    _write_shards(directory, state, num_shards)


def hf_tokenizer() -> Any:
    """Make the tokenizer of these models: the tiny vocabulary, `<image>` and `<pad>`."""
    tokenizer: Any = LlamaTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def write_hf_adapter(directory: Path, base: Path, target: Target = "attention", **options: Any) -> None:
    """Write an adapter that PEFT made on a model of transformers' layout, as if it had been trained.

    Args:
        directory: Where.
        base: A directory that `write_hf` wrote.
        target: What it is trained on.
        **options: Further fields of `LoraConfig`.
    """
    _write_adapter(load_hf(base), directory, base, target, options)


def write_native_peft_adapter(directory: Path, base: Path, target: Target = "attention", **options: Any) -> None:
    """Write an adapter that PEFT made on a model of the native layout, without a run of this program."""
    from llava_ft.inference.load import load_model

    _write_adapter(load_model(str(base), dtype=torch.float32).model, directory, base, target, options)


def _write_adapter(model: nn.Module, directory: Path, base: Path, target: Target, options: dict[str, Any]) -> None:
    targets: dict[Target, Any] = {
        "attention": ["q_proj", "v_proj"],
        "projector beside": r".*(language_model|model)\.layers\.\d+\.self_attn\.[qkv]_proj",
        "all-linear": "all-linear",
    }
    is_native = any("mm_projector" in name for name, _ in model.named_parameters())
    saved = "mm_projector" if is_native else "multi_modal_projector"
    beside = {"modules_to_save": [saved]} if target == "projector beside" else {}
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=targets[target], **beside, **options)
    config.base_model_name_or_path = str(base)
    torch.manual_seed(1)  # the same matrices whatever ran before: bounds of float32 are close
    wrapped: Any = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(directory)


def _spread(model: nn.Module) -> None:
    """Give each parameter values of its own: transformers' start has biases of zero and norms of one."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)


def _processor(model: Model, tokenizer: Any, pads: bool) -> Any:
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    common = {
        "tokenizer": tokenizer,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    if model == "llava":
        return LlavaProcessor(image_processor=LlavaImageProcessorPil(do_pad=pads, **sizes), **common)
    tiles = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS_HW, **sizes)
    return LlavaNextProcessor(image_processor=tiles, **common)


def _hub_name(name: str) -> str:
    for ours, hub in _HUB_NAMES:
        if name.startswith(ours):
            return hub + name.removeprefix(ours)
    raise AssertionError(name)


def _write_files_as_on_the_hub(directory: Path, model: Model, config: dict[str, Any], pads: bool) -> None:
    """Rewrite configuration, processor and tokenizer files in the form that transformers 4 gave them."""
    kind = "LlavaForConditionalGeneration" if model == "llava" else "LlavaNextForConditionalGeneration"
    pad_token_id = config["image_token_index"] + 1
    added = {"architectures": [kind], "model_type": model, "pad_token_id": pad_token_id, "torch_dtype": "float32"}
    _write_json(directory / "config.json", {**config, **added, "transformers_version": "4.36.0.dev0"})
    processor = json.loads((directory / "processor_config.json").read_text())
    images = processor.pop("image_processor")
    if model == "llava" and not pads:
        images["image_processor_type"] = "CLIPImageProcessor"
        del images["do_pad"]
    _write_json(directory / "preprocessor_config.json", images)
    _write_json(directory / "processor_config.json", processor)
    (directory / "chat_template.jinja").unlink()
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    shutil.copyfile(TOKENIZER / "tokenizer.model", directory / "tokenizer.model")
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    image_token, pad_token = (
        {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for content in ("<image>", "<pad>")
    )
    settings["added_tokens_decoder"] = {str(pad_token_id - 1): image_token, str(pad_token_id): pad_token}
    settings |= {"pad_token": "<pad>", "padding_side": "left", "processor_class": "LlavaProcessor"}
    _write_json(directory / "tokenizer_config.json", settings)


def _write_shards(directory: Path, state: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: state[name] for name in list(state)[index::num_shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in state.values())
    _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
