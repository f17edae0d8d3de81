"""The parts of a LLaVA model: the one list of them, and the one function from a parameter's name to its part.

A model is embeddings, decoder ("language model"), head, projector with `image_newline`, and vision tower. Training adds
two parts inside them: LoRA weights, and the trained rows of added tokens. Every question "what is this tensor?" -
which rate, which dtype, which file, which row of a table - starts here.
"""

import re
from collections.abc import Iterable
from typing import Final, Literal

from torch import nn

Part = Literal[
    "embeddings",
    "language model",
    "head",
    "projector",
    "image newline",
    "vision tower",
    "LoRA",
    "new token rows",
]

PARTS: Final[tuple[Part, ...]] = (
    "embeddings",
    "language model",
    "head",
    "projector",
    "image newline",
    "vision tower",
    "LoRA",
    "new token rows",
)
"""All parts, in the order in which they are shown."""

LANGUAGE_MODEL: Final[frozenset[Part]] = frozenset({"embeddings", "language model", "head"})
"""The language model as a file of its own would hold it: what an adapter is trained on."""

PROJECTOR: Final[frozenset[Part]] = frozenset({"projector", "image newline"})
"""What is trained, saved and replaced together with the projector."""

DECODER_LAYER: Final = r"model\.layers\.\d+\."
"""What the names of everything in the decoder's layers start with, whatever the family: LLaVA's native layout."""

VISION_PREFIX: Final = "model.vision_tower.vision_tower.vision_model."
"""What the names of everything in the vision tower start with."""

_MODULES: Final[dict[str, Part]] = {
    "vision_tower": "vision tower",
    "mm_projector": "projector",
    "image_newline": "image newline",
    "embed_tokens": "embeddings",
    "lm_head": "head",
}


def module_part(name: str) -> Part:
    """Return the part in which a parameter lies: for LoRA weights and rows of added tokens, the part they change.

    Args:
        name: Name of a parameter or module in the model, with or without PEFT's and other wrappers' prefixes.
    """
    for step in name.split("."):
        if step in _MODULES:
            return _MODULES[step]
    return "language model"


def part_of(name: str) -> Part:
    """Return the part that a parameter is; LoRA weights and rows of added tokens are parts of their own.

    Args:
        name: As for `module_part`.
    """
    steps = name.split(".")
    if any(step.startswith("lora_") for step in steps):
        return "LoRA"
    if "new_rows" in steps:
        return "new token rows"
    return module_part(name)


def any_in(part: Part, names: Iterable[str]) -> bool:
    """Whether one of the parameters lies in a part; see `module_part`."""
    return any(module_part(name) == part for name in names)


def language_model_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers of the decoder, without the head, in model order: what is adapted and quantised."""
    pattern = re.compile(DECODER_LAYER)
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern.match(name)]
