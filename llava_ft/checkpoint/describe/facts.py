"""What follows from names and shapes: widths, numbers of layers, vocabulary, the kind of projector, the rank."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from llava_ft.checkpoint.describe.files import TensorHeader
from llava_ft.checkpoint.names import EMBEDDINGS, HEAD, is_transformers_spelling

_LAYER: Final = re.compile(r"^model\.layers\.(\d+)\.")
_TOWER_LAYER: Final = re.compile(r"encoder\.layers\.(\d+)\.")
_LORA: Final = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_WIDTH_IN: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers that read the hidden state."""

_MOST_NEW_ROWS: Final = 100
"""Vocabularies are larger; what is added to them is smaller."""


@dataclass
class Facts:
    """Sizes of a model, as far as the tensors say them.

    Attributes:
        layout: "native" or "hf", by the spelling of the keys; "" if they could be either.
        hidden_size: Width of the language model.
        num_layers: Its layers, or those that an adapter reaches.
        vocab_size: Rows of its embeddings.
        intermediate_size: Width inside its feed-forward layers.
        projector: Type of the projector.
        projector_in: Width that it reads: that of the tower's features.
        tower_width: Width of the vision tower.
        tower_layers: Its layers.
        is_dora: Whether an adapter has DoRA magnitudes.
        rank: Ranks of an adapter, such as "8" or "8, 16".
        targets: Last names of the layers that an adapter changes.
        num_new_rows: Rows of added tokens.
        dtypes: Types on disk, the one with most bytes first.
    """

    layout: str = ""
    hidden_size: int | None = None
    num_layers: int | None = None
    vocab_size: int | None = None
    intermediate_size: int | None = None
    projector: str | None = None
    projector_in: int | None = None
    tower_width: int | None = None
    tower_layers: int | None = None
    is_dora: bool = False
    rank: str | None = None
    targets: tuple[str, ...] = ()
    num_new_rows: int | None = None
    dtypes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what is known."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "", (), False)}


def facts_of(tensors: Iterable[TensorHeader]) -> Facts:
    """Read the facts from tensors."""
    tensors = list(tensors)
    by_name = {tensor.name: tensor for tensor in tensors}
    facts = Facts(layout=_layout(tensors), dtypes=_dtypes(tensors))
    layers = [int(match[1]) for name in by_name if (match := _LAYER.match(name))]
    facts.num_layers = max(layers) + 1 if layers else None
    towers = [int(match[1]) for t in tensors if t.part == "vision tower" and (match := _TOWER_LAYER.search(t.name))]
    facts.tower_layers = max(towers) + 1 if towers else None
    widths = [t.shape[-1] for t in tensors if t.name.endswith("class_embedding") and t.shape]
    facts.tower_width = widths[0] if widths else None
    rows = [t.shape[0] for t in tensors if t.part == "rows of added tokens" and t.shape]
    facts.num_new_rows = rows[0] if rows else None
    for name in (HEAD, EMBEDDINGS):
        if name in by_name and len(by_name[name].shape) == 2:
            facts.vocab_size, facts.hidden_size = by_name[name].shape
    if facts.vocab_size and facts.vocab_size < _MOST_NEW_ROWS and not layers:
        facts.num_new_rows, facts.vocab_size = facts.vocab_size, None  # a projector's file holds these rows alone
    _add_lora(facts, tensors)
    _add_layers(facts, by_name)
    _add_projector(facts, by_name)
    return facts


def lora_modules(tensors: Iterable[TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
    """Return the LoRA matrices, A and B, of each module by its native name."""
    found: dict[str, dict[str, TensorHeader]] = {}
    for tensor in tensors:
        match = _LORA.fullmatch(tensor.name)
        if match is not None:
            found.setdefault(match["module"], {})[match["matrix"]] = tensor
    return found


def _add_lora(facts: Facts, tensors: list[TensorHeader]) -> None:
    modules = lora_modules(tensors)
    facts.is_dora = any(tensor.part == "DoRA magnitudes" for tensor in tensors)
    ranks = sorted({pair["A"].shape[0] for pair in modules.values() if "A" in pair and len(pair["A"].shape) == 2})
    facts.rank = ", ".join(map(str, ranks)) or None
    facts.targets = tuple(sorted({module.rpartition(".")[2] for module in modules}))
    for module, pair in modules.items():
        if module.startswith("model.layers.") and module.endswith(_WIDTH_IN) and "A" in pair:
            facts.hidden_size = facts.hidden_size or pair["A"].shape[-1]
        if module.startswith("model.layers.") and module.endswith("down_proj") and "A" in pair:
            facts.intermediate_size = pair["A"].shape[-1]


def _add_layers(facts: Facts, by_name: dict[str, TensorHeader]) -> None:
    for name, tensor in by_name.items():
        if name.startswith("model.layers.") and name.endswith(".mlp.gate_proj.weight") and len(tensor.shape) == 2:
            facts.intermediate_size, facts.hidden_size = tensor.shape
            return


def _add_projector(facts: Facts, by_name: dict[str, TensorHeader]) -> None:
    """Tell the projector's type from its layers: `model.mm_projector.weight`, or those at 0, 2, 4 and so on."""
    linear = by_name.get("model.mm_projector.weight")
    layers = [
        (int(match[1]), tensor)
        for name, tensor in by_name.items()
        if (match := re.fullmatch(r"model\.mm_projector\.(\d+)\.weight", name)) and len(tensor.shape) == 2
    ]
    if linear is not None and len(linear.shape) == 2:
        facts.projector, layers = "linear", [(0, linear)]
    elif [number for number, _ in sorted(layers)] == list(range(0, 2 * len(layers), 2)) and layers:
        facts.projector = f"mlp{len(layers)}x_gelu"
    elif layers:
        facts.projector = "unknown"
    if layers:
        layers.sort(key=lambda layer: layer[0])
        facts.projector_in = layers[0][1].shape[1]
        facts.hidden_size = facts.hidden_size or layers[-1][1].shape[0]


def _layout(tensors: list[TensorHeader]) -> str:
    llava = [t for t in tensors if t.part not in ("other", "derived", "CLIP text half")]
    if any(is_transformers_spelling(t.key) for t in llava):
        return "hf"
    is_native = any("mm_projector" in t.key or "vision_tower.vision_tower" in t.key for t in llava)
    return "native" if is_native else ""


def _dtypes(tensors: list[TensorHeader]) -> tuple[str, ...]:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return tuple(sorted(sizes, key=lambda dtype: -sizes[dtype]))
