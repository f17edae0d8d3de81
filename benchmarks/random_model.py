"""LLaVA checkpoints of random weights, to measure time and memory on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny-llava"
WORDS = ("red", "circle", "blue", "square", "three", "letter", "green", "star")
"""Words that the tokenizer of data/tiny-llava knows."""


def write_model(
    directory: Path, language: Mapping[str, Any], vision: Mapping[str, Any], *, dtype: str = "float32"
) -> None:
    """Write a LLaVA with an mlp2x_gelu projector, its tower inside, with the tokenizer of data/tiny-llava.

    Args:
        directory: Where it is written; made here.
        language: Sizes of the language model: fields of `LlamaConfig`. The vocabulary is at least the tokenizer's.
        vision: Sizes of the tower: fields of `CLIPVisionConfig`.
        dtype: Type of the weights. A GPU draws them if there is one.
    """
    import torch

    from llava_ft.checkpoint.save import ShardWriter, config_fields, write_json
    from llava_ft.data.tokenizer import load_tokenizer
    from llava_ft.models.builder import build_skeleton, settle_config
    from llava_ft.models.towers import tower_fields

    fields: dict[str, Any] = {
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **language,
    }
    fields["vocab_size"] = max(fields["vocab_size"], len(load_tokenizer(TINY)))
    wishes = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    tower = tower_fields(dict(vision), "inside")
    config = settle_config(fields, "random", wishes=wishes, vision_tower="inside", vision=tower)
    directory.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(1)
    parameters = dict(build_skeleton(config).named_parameters())
    layout = {name: (tuple(parameter.shape), getattr(torch, dtype)) for name, parameter in parameters.items()}
    writer = ShardWriter(directory, layout, max_shard_bytes=10**9)
    for name, parameter in parameters.items():
        is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight"))
        values = torch.randn(parameter.shape, generator=generator, device=device) * 0.02
        writer.add(name, (values + 1 if is_scale else values).to("cpu", getattr(torch, dtype)))
    writer.finish()
    write_json(directory / "config.json", config_fields(config, getattr(torch, dtype)))
    side = vision["image_size"]
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    settings |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    write_json(directory / "preprocessor_config.json", settings)
    for file in TINY.glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)
