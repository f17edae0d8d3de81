"""What follows from names and shapes: sizes of a model, the kind of projector, the rank; and many tensors in few lines.

Tensors that differ in the number of their layer, or have the same shape, become one line.
"""

import os.path
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, groupby
from typing import Any, Final

from llava_ft.checkpoint.names import EMBEDDINGS, HEAD, is_transformers_spelling
from llava_ft.inspection.weight_headers import PARTS_OF_FILES, TensorHeader
from llava_ft.models.parts import module_part

_LAYER: Final = re.compile(r"^model\.layers\.(\d+)\.")
_TOWER_LAYER: Final = re.compile(r"encoder\.layers\.(\d+)\.")
_PROJECTOR_LAYER: Final = re.compile(r"model\.mm_projector\.(?:(\d+)\.)?weight")
_LORA: Final = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_WIDTH_IN: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers that read the hidden state."""

_MOST_NEW_ROWS: Final = 100
"""Vocabularies are larger; what is added to them is smaller."""

_INDEX: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_MOST_CHARACTERS: Final = 60
"""Of the names in braces."""


@dataclass
class WeightFacts:
    """Sizes of a model, as far as the tensors say them."""

    layout: str = ""  # "native" or "hf", by the spelling of the keys; "" if they could be either
    hidden_size: int | None = None
    num_layers: int | None = None  # of an adapter, those that it reaches
    vocab_size: int | None = None
    intermediate_size: int | None = None
    projector: str | None = None
    projector_in: int | None = None  # width of the tower's features
    tower_width: int | None = None
    tower_layers: int | None = None
    is_dora: bool = False
    rank: str | None = None  # such as "8" or "8, 16"
    targets: tuple[str, ...] = ()  # last names of the layers that an adapter changes
    num_new_rows: int | None = None  # of added tokens
    dtypes: tuple[str, ...] = ()  # the one with most bytes first

    def to_json(self) -> dict[str, Any]:
        """Return what is known."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "", (), False)}


def facts_of(tensors: Iterable[TensorHeader]) -> WeightFacts:
    """Read the facts from tensors."""
    tensors = list(tensors)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    facts = WeightFacts(is_dora=any(tensor.part == "DoRA magnitudes" for tensor in tensors))
    num_bytes = Counter[str]()
    for tensor in tensors:
        num_bytes[tensor.dtype] += tensor.num_bytes
        if tensor.name.endswith("class_embedding") and tensor.shape:
            facts.tower_width = facts.tower_width or tensor.shape[-1]
        if tensor.part == "rows of added tokens" and tensor.shape:
            facts.num_new_rows = facts.num_new_rows or tensor.shape[0]
    facts.dtypes = tuple(dtype for dtype, _ in num_bytes.most_common())
    layers = [int(match[1]) for name in shapes if (match := _LAYER.match(name))]
    of_tower = [tensor.name for tensor in tensors if tensor.part == "vision tower"]
    tower_layers = [int(match[1]) for name in of_tower if (match := _TOWER_LAYER.search(name))]
    facts.num_layers, facts.tower_layers = (max(found) + 1 if found else None for found in (layers, tower_layers))
    keys = [tensor.key for tensor in tensors if tensor.part not in ("other", "derived", "CLIP text half")]
    if any(map(is_transformers_spelling, keys)):
        facts.layout = "hf"
    elif any("mm_projector" in key or "vision_tower.vision_tower" in key for key in keys):
        facts.layout = "native"

    for name in (HEAD, EMBEDDINGS):
        if len(shapes.get(name, ())) == 2:
            facts.vocab_size, facts.hidden_size = shapes[name]
    if facts.vocab_size and facts.vocab_size < _MOST_NEW_ROWS and not facts.num_layers:
        facts.num_new_rows, facts.vocab_size = facts.vocab_size, None  # a projector's file holds these rows alone

    modules = lora_modules(tensors)
    inputs = {name: pair["A"].shape for name, pair in modules.items() if "A" in pair and len(pair["A"].shape) == 2}
    facts.rank = ", ".join(str(rank) for rank in sorted({rank for rank, _ in inputs.values()})) or None
    facts.targets = tuple(sorted({module.rpartition(".")[2] for module in modules}))
    for module, (_, width) in inputs.items():
        if module.startswith("model.layers.") and module.endswith(_WIDTH_IN):
            facts.hidden_size = facts.hidden_size or width
        if module.startswith("model.layers.") and module.endswith("down_proj"):
            facts.intermediate_size = width
    gates = (s for n, s in shapes.items() if _LAYER.match(n) and n.endswith(".mlp.gate_proj.weight") and len(s) == 2)
    facts.intermediate_size, facts.hidden_size = next(gates, (facts.intermediate_size, facts.hidden_size))

    # A linear projector has no number; layers of an MLP are at 0, 2, 4 and so on, with activations between them.
    of_projector = [(name, shape) for name, shape in shapes.items() if module_part(name) == "projector"]
    matches = [(_PROJECTOR_LAYER.fullmatch(name), shape) for name, shape in of_projector if not name.endswith("bias")]
    if matches and all(match is not None and len(shape) == 2 for match, shape in matches):
        layers = sorted((int(match[1] or -1), shape) for match, shape in matches if match)
        numbers = [number for number, _ in layers]
        is_mlp = numbers == list(range(0, 2 * len(layers), 2))
        facts.projector = "linear" if numbers[0] == -1 else f"mlp{len(layers)}x_gelu" if is_mlp else "unknown"
        facts.projector_in = layers[0][1][1]
        facts.hidden_size = facts.hidden_size or layers[-1][1][0]
    return facts


def lora_modules(tensors: Iterable[TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
    """Return the LoRA matrices, A and B, of each module by its native name."""
    found: dict[str, dict[str, TensorHeader]] = {}
    for tensor in tensors:
        if match := _LORA.fullmatch(tensor.name):
            found.setdefault(match["module"], {})[match["matrix"]] = tensor
    return found


@dataclass(frozen=True)
class Fold:
    """Tensors of one shape and type, by one pattern such as `model.layers.0-31.self_attn.{k,o,q,v}_proj.weight`."""

    names: str
    shape: tuple[int, ...]
    dtype: str
    num_tensors: int


@dataclass
class PartSummary:
    """The tensors of one part."""

    part: str
    num_tensors: int
    num_values: int
    num_bytes: int
    names: list[Fold]


def summarise(tensors: Sequence[TensorHeader]) -> list[PartSummary]:
    """Group tensors by part, in the order of `PARTS_OF_FILES`."""
    summaries: list[PartSummary] = []
    for part in PARTS_OF_FILES:
        if members := [tensor for tensor in tensors if tensor.part == part]:
            num_values, num_bytes = sum(t.num_values for t in members), sum(t.num_bytes for t in members)
            summaries.append(PartSummary(part, len(members), num_values, num_bytes, fold(members)))
    return summaries


def fold(tensors: Iterable[TensorHeader]) -> list[Fold]:
    """Fold tensors, by their keys on disk."""
    # First layers: names that differ in their first number. Then names whose shape, type and layers are the same.
    numbered: defaultdict[tuple[str, tuple[int, ...], str], list[str]] = defaultdict(list)
    for tensor in tensors:
        pattern = _INDEX.sub("*", tensor.key, count=1)
        numbered[pattern, tensor.shape, tensor.dtype] += _INDEX.findall(tensor.key)[:1] or [""]
    alike: defaultdict[tuple[str, tuple[int, ...], str], list[tuple[str, int]]] = defaultdict(list)
    for (pattern, shape, dtype), found in numbered.items():
        numbers = ranges(int(number) for number in found if number)
        names = pattern.replace("*", numbers, 1) if numbers else pattern
        alike[numbers, shape, dtype].append((names, len(found)))
    return [
        Fold(braced([names for names, _ in members]), shape, dtype, sum(count for _, count in members))
        for (_, shape, dtype), members in alike.items()
    ]


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ranges: 0, 1, 2 and 5 are `0-2,5`."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0])
    ]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def braced(names: Sequence[str]) -> str:
    """Write names that begin and end alike as one, with what differs in braces."""
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix(names)  # noqa: RUF071 - of characters, as it is meant
    start = common[: common.rfind(".") + 1]
    rests = [name.removeprefix(start) for name in names]
    backwards = os.path.commonprefix([rest[::-1] for rest in rests])  # noqa: RUF071
    end = backwards[: max(backwards.rfind("."), backwards.rfind("_")) + 1][::-1]
    middles = sorted(rest.removesuffix(end) for rest in rests)
    if not all(middles):
        end, middles = "", sorted(rests)
    num_shown = sum(length <= _MOST_CHARACTERS + 1 for length in accumulate(len(middle) + 1 for middle in middles))
    more = [f"and {len(middles) - num_shown} more"] if num_shown < len(middles) else []
    return f"{start}{{{','.join([*middles[:num_shown], *more])}}}{end}"
