"""A configuration is compared with the shapes of its weights before a model is built from it.

Layers are Python objects whatever their weights take, each parameter is reserved for a moment before it is taken away
again, and rotary frequencies and numbers of positions stay in memory. A `config.json` that asks for a billion layers
would take all of the memory before a missing weight could be reported.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.names import EMBEDDINGS
from llava_ft.errors import CheckpointError
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.families import family_of
from llava_ft.models.parts import VISION_PREFIX
from llava_ft.models.towers import describe_tower

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NAMES = {"query_width": "num_attention_heads x head_dim"}

_Shapes = Mapping[str, tuple[int, ...]]


def check_config(config: LlavaModelConfig, sources: Sequence[WeightSource], where: str) -> None:
    """Refuse a configuration that asks for more than its weights hold, or for fewer tokens.

    What else is too small is left to `plan_sources`, which compares every shape; with fewer tokens the last ones would
    seem to be added. Messages name `where` it comes from.

    Args:
        config: The settled configuration.
        sources: Where the weights lie, the base's own files first.
        where: The base, for messages.

    Raises:
        CheckpointError: It does not go with the files.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for source in sources:
        shapes |= {name: source.files.tensors[key].shape for key, name in source.names.items()}
        num_rows = _size(shapes, EMBEDDINGS, 0)
        if source is sources[0] and num_rows > config.vocab_size:
            raise CheckpointError(
                f"The configuration of {where} says vocab_size={config.vocab_size:,}, but {EMBEDDINGS} has "
                f"{num_rows:,} rows. Does config.json belong to another model?"
            )
    for field, wanted, held, proof in _sizes(config, shapes):
        if wanted > held:
            raise CheckpointError(
                f"The configuration of {where} says {field}={wanted:,}, but by {proof} it can be {held:,}. Is a file "
                "missing, or does config.json belong to another model?"
            )


def _sizes(config: LlavaModelConfig, shapes: _Shapes) -> Iterator[tuple[str, int, int, str]]:
    """Yield each field's name and value, the value that the files can hold, and where they say so."""
    yield "num_hidden_layers", config.num_hidden_layers, *_layers(_LAYER, shapes)
    yield "vocab_size", config.vocab_size, _size(shapes, EMBEDDINGS, 0), EMBEDDINGS
    yield "hidden_size", config.hidden_size, _size(shapes, EMBEDDINGS, 1), EMBEDDINGS
    for field, name, dimension in family_of(config).sizes:
        name = f"model.layers.0.{name}"
        yield _NAMES.get(field, field), getattr(config, field), _size(shapes, name, dimension), name
    if config.mm_vision_config is None:
        return
    tower, architecture, facts = describe_tower(config.mm_vision_config)
    layer = re.compile(re.escape(f"{VISION_PREFIX}{tower.layers}.") + r"(\d+)\.")
    yield "num_hidden_layers of the vision tower", facts.depth, *_layers(layer, shapes)
    for field, name, dimension in tower.sizes:
        name = VISION_PREFIX + name
        yield f"{field} of the vision tower", getattr(architecture, field), _size(shapes, name, dimension), name
    if tower.positions is not None:
        name, per_side = VISION_PREFIX + tower.positions, facts.image_size // facts.patch_size
        wanted = per_side**2 + facts.num_prefix_tokens
        yield f"(image_size / patch_size)^2 + {facts.num_prefix_tokens}", wanted, _size(shapes, name, 0), name


def _size(shapes: _Shapes, name: str, dimension: int) -> int:
    shape = shapes.get(name, ())
    return shape[dimension] if dimension < len(shape) else 0


def _layers(pattern: re.Pattern[str], names: Iterable[str]) -> tuple[int, str]:
    return len({match[1] for name in names if (match := pattern.match(name))}), "the layers in its files"
