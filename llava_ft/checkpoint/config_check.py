"""A configuration is compared with the shapes of its weights before a model is built from it.

Parameters are built without memory, but not the modules that hold them, nor what follows from sizes: rotary
frequencies, numbers of positions. A `config.json` that asks for a billion layers would take all of the memory before a
missing weight could be reported.
"""

import re
from collections.abc import Iterable

from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.names import VISION_PREFIX
from llava_ft.errors import CheckpointError
from llava_ft.models.config import LlavaLlamaConfig

_QUERY = "model.layers.0.self_attn.q_proj.weight"
_POSITIONS = f"{VISION_PREFIX}embeddings.position_embedding.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_VISION_LAYER = re.compile(re.escape(VISION_PREFIX) + r"encoder\.layers\.(\d+)\.")


def check_config(config: LlavaLlamaConfig, sources: Iterable[WeightSource], where: str) -> None:
    """Refuse a configuration whose sizes are not those of the weights.

    Checked is what takes memory when the model is built; the shape of each weight is compared afterwards, by
    `plan_sources`.

    Args:
        config: The settled configuration.
        sources: Where the weights lie.
        where: The directory it comes from, for messages.

    Raises:
        CheckpointError: It asks for more than the files hold.
    """
    shapes = {name: source.files.tensors[key].shape for source in sources for key, name in source.names.items()}
    _check_layers("num_hidden_layers", config.num_hidden_layers, _LAYER, shapes, where)
    query = shapes.get(_QUERY)
    heads = config.num_attention_heads
    width = config.head_dim or config.hidden_size // max(heads, 1)
    if query is None or heads * width != query[0]:
        held = 0 if query is None else query[0]
        raise CheckpointError(
            f"The configuration of {where} says {heads} heads of {width} values, but {_QUERY} has {held} rows. It "
            "belongs to another model; copy the right config.json."
        )
    vision, positions = config.vision_config, shapes.get(_POSITIONS)
    if vision is None:
        return
    _check_layers("num_hidden_layers of the vision tower", vision.num_hidden_layers, _VISION_LAYER, shapes, where)
    image_size, patch_size = vision.image_size, vision.patch_size
    assert isinstance(image_size, int)
    assert isinstance(patch_size, int)
    if positions is None or (image_size // max(patch_size, 1)) ** 2 + 1 != positions[0]:
        held = 0 if positions is None else positions[0] - 1
        raise CheckpointError(
            f"The configuration of {where} says images of {image_size} pixels in patches of {patch_size}, but its "
            f"vision tower has {held} positions for patches. It belongs to another tower; copy the right "
            "config.json."
        )


def _check_layers(field: str, wanted: int, pattern: re.Pattern[str], names: Iterable[str], where: str) -> None:
    held = len({match[1] for name in names if (match := pattern.match(name))})
    if wanted > held:
        raise CheckpointError(
            f"The configuration of {where} says {field}={wanted:,}, but its files hold {held} layers. Is a shard "
            "missing, or does config.json belong to another model?"
        )
