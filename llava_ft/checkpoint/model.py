"""The model a run or a conversation starts from: base, vision tower and projector, found and checked, then loaded.

`find_model` is where a configuration is settled, for training, planning, looking at data, use and conversions alike. It
answers everything that can be known without reading weights, so that a wrong request is refused at once; `load_base`
then reads them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from llava_ft.checkpoint.config_check import check_config
from llava_ft.checkpoint.directory import (
    ModelDirectory,
    Need,
    find_model_directory,
    read_config,
    resolve_model_path,
)
from llava_ft.checkpoint.fingerprint import language_model_fingerprint
from llava_ft.checkpoint.load import Division, Ledger, WeightSource, load_weights
from llava_ft.checkpoint.names import (
    EMBEDDINGS,
    HEAD,
    IMAGE_NEWLINE,
    native_name,
)
from llava_ft.checkpoint.quantized import refuse_quantized
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.constants import IM_START_TOKEN
from llava_ft.data.image_processor import PREPROCESSOR_CONFIG, image_settings_file
from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.errors import CheckpointError, some_of
from llava_ft.models.builder import build_skeleton, is_llava_config, settle_config
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.models.parts import any_in, module_part
from llava_ft.models.towers import VisionTower, find_tower, tower_fields
from llava_ft.tuning.quant import Quantization, check_quantized, quantize_linears

if TYPE_CHECKING:
    from llava_ft.checkpoint.adapter import LoraAdapter

logger = logging.getLogger(__name__)

_NO_BASES = {
    "lora": "a LoRA adapter and no language model. Give its base model, and the adapter with --lora_weight_path "
    "(training) or as the model path (use).",
    "projector": "a projector and no language model. Give its language model, and the projector with "
    "--pretrain_mm_mlp_adapter.",
    "vision tower": "a vision tower and no language model. Give it with --vision_tower, and a language model here.",
}
"""What can be given by mistake, and where it belongs."""


@dataclass(frozen=True)
class ModelSpec:
    """What a model is made of, known before any weight is read."""

    directory: ModelDirectory  # a language model or a LLaVA checkpoint
    config: LlavaModelConfig  # the settled configuration
    sources: tuple[WeightSource, ...]
    """Where the weights lie, later ones winning, the base's own files first; empty where they are not needed."""
    projector_is_new: bool  # whether no file holds the projector, so that it starts from random weights
    newline_is_new: bool
    """Whether the model has an `image_newline` that its base was not trained with and no file holds."""
    vision_directory: Path | None  # where it is said how images are prepared; None for a text-only model
    token_rows: WeightFiles | None = None
    """File with embedding rows that projector pretraining trained for added tokens, if any."""
    notes: tuple[str, ...] = ()
    """What the user should know about where the architecture is from, or what was put together."""
    given: tuple[ModelDirectory, ...] = ()  # what the user named: the base itself, or what was trained on it
    adapters: tuple[tuple[float, "LoraAdapter"], ...] = ()  # LoRA adapters on the base, and the weight of each
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """Trained rows of added tokens, by the native name of the matrix whose last rows they are."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that was written with what the user named, or the base's.

        Raises:
            CheckpointError: Several adapters have different vocabularies.
        """
        files = ("tokenizer_config.json", "tokenizer.model")
        paths = [
            directory.path if any((directory.path / name).is_file() for name in files) else self.directory.path
            for directory in self.given or (self.directory,)
        ]
        first, *others = (load_tokenizer(path) for path in dict.fromkeys(paths))
        for other in others:
            if other.get_vocab() != first.get_vocab():
                raise CheckpointError(
                    f"{self.given[0].path} and another adapter have different vocabularies ({len(first)} and "
                    f"{len(other)} entries). Only adapters with the same tokens can be put together."
                )
        return first

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the base's language model; reads a few pages of each of its files."""
        return language_model_fingerprint(self.sources[:1])

    @property
    def has_vision(self) -> bool:
        """Whether it has a vision tower."""
        return self.config.mm_vision_config is not None

    @property
    def holds_vision_tower(self) -> bool:
        """Whether the base model's own files hold a vision tower, which may be another than the one it names.

        Where the files are not here: whether they are known to, since original LLaVA notes that it was trained.
        """
        if self.sources:
            return any_in("vision tower", self.sources[0].names.values())
        return bool(self.config.to_dict().get("unfreeze_mm_vision_tower"))


def find_model(
    model_name_or_path: str,
    *,
    vision_tower: str | None = None,
    projector_file: str | None = None,
    wishes: Mapping[str, Any] | None = None,
    extra_sources: Sequence[WeightSource] = (),
    cache_dir: str | None = None,
    need: Need = "weights",
) -> ModelSpec:
    """Find the files of a model and settle its configuration.

    Args:
        model_name_or_path: A language model or a LLaVA checkpoint, by directory or hub name.
        vision_tower: Directory or hub name. When absent, the one that a LLaVA checkpoint names; a language model
            then stays text-only.
        projector_file: A file with a projector (`mm_projector.bin`), which wins over the checkpoint's own.
        wishes: Configuration fields the user set; see `settle_config`.
        extra_sources: Further weights that win over all others, such as what was trained beside an adapter.
        cache_dir: Where downloads are kept.
        need: What of the model has to be here. Without weights only the configuration is settled.

    Raises:
        UserError: Something is missing, damaged or does not fit together.
    """
    directory = find_model_directory(model_name_or_path, need, cache_dir=cache_dir)
    if directory.kind not in ("llava", "language model"):
        raise CheckpointError(f"{directory.path} holds {_NO_BASES[directory.kind]}")
    sources: list[WeightSource] = []
    has_tower = "mm_vision_config" in directory.config  # unless the weights say otherwise
    if need == "weights":
        refuse_quantized(str(directory.path))
        sources.append(WeightSource.of("base model", WeightFiles.open(directory.path), native_name))
        has_tower = any_in("vision tower", sources[0].names.values())
    tower_name = vision_tower or directory.config.get("mm_vision_tower")
    # An adapter's config.json repeats the tower's name of its base; that asks for no other tower.
    asks_for_another = vision_tower is not None and vision_tower != directory.config.get("mm_vision_tower")
    inside = directory.config.get("mm_vision_config") if has_tower else None
    vision, tower_directory = None, None
    if inside and not asks_for_another:
        vision = tower_fields(inside, str(directory.path))
    elif tower_name is not None:
        tower_directory, fields = _find_tower(tower_name, need, cache_dir, directory.path)
        vision = tower_fields(fields, str(tower_directory))
        if need == "weights" and inside and vision != tower_fields(inside, str(directory.path)):
            raise CheckpointError(
                f"The vision tower {tower_name} has another architecture than the one whose weights are in "
                f"{directory.path}. Leave --vision_tower out to use the checkpoint's."
            )
        if need == "weights" and has_tower:
            logger.info("The vision tower's weights are taken from %s, not from %s.", directory.path, tower_directory)
    elif is_llava_config(directory.config) and directory.config.get("use_mm_proj", True):  # not trained on text alone
        raise CheckpointError(
            f"{directory.path} is a LLaVA checkpoint that does not name its vision tower. Give it with --vision_tower."
        )
    config = settle_config(
        directory.config,
        str(directory.path),
        wishes=wishes or {},
        vision_tower=tower_name,
        vision=vision,
        projector_is_replaced=projector_file is not None
        or any(any_in("projector", source.names.values()) for source in extra_sources),
    )
    if need != "weights":
        places = [path for path in (directory.path, tower_directory) if path is not None]
        notes = [f"{path} is not on this machine; its published architecture is used." for path in places]
        return ModelSpec(
            directory=directory,
            config=config,
            sources=(),
            projector_is_new=False,
            newline_is_new=False,
            vision_directory=None,
            notes=tuple(note for note, path in zip(notes, places, strict=True) if not path.is_dir()),
        )
    if vision is not None and not has_tower:
        assert tower_directory is not None
        tower = find_tower(vision)
        assert tower is not None
        sources.append(WeightSource.of("vision tower", WeightFiles.open(tower_directory), tower.native_name))

    beside = directory.projector_file if directory.kind == "llava" and not projector_file else None
    if beside is not None and any_in("projector", sources[0].names.values()):
        logger.info("%s is not used: the model's own weights hold the projector.", beside)
    elif beside is not None:
        logger.info("The projector is taken from %s: the model's own weights lack it.", beside)
        projector_file = str(beside)
    token_rows = None
    if projector_file:
        projector, token_rows = _open_projector(Path(projector_file), config)
        sources = [*(_only(source, lambda name: module_part(name) != "projector") for source in sources), projector]
    _check_whole_projector(sources, extra_sources)
    sources += extra_sources
    check_config(config, sources, str(directory.path))
    if config.tie_word_embeddings:
        _check_tied_head(sources[0])

    places = [path for path in (directory.path, tower_directory) if path is not None]
    vision_directory = next((path for path in places if image_settings_file(path) is not None), None)
    if vision is not None and vision_directory is None:
        raise CheckpointError(
            f"{PREPROCESSOR_CONFIG}, which says how images are prepared, is missing from "
            f"{' and '.join(map(str, places))}. Copy it from the vision tower's repository."
        )
    names = {name for source in sources for name in source.names.values()}
    had_newline = "unpad" in (directory.config.get("mm_patch_merge_type") or "")
    is_untrained = vision is not None and directory.kind != "llava"  # a LLaVA checkpoint has its projector in a file
    return ModelSpec(
        directory=directory,
        config=config,
        sources=tuple(sources),
        projector_is_new=is_untrained and not any_in("projector", names),
        newline_is_new=config.has_image_newline and not had_newline and IMAGE_NEWLINE not in names,
        vision_directory=vision_directory if vision is not None else None,
        token_rows=token_rows,
    )


def count_new_rows(config: LlavaModelConfig, tokenizer: PreTrainedTokenizerFast, where: Path) -> int:
    """Return by how many entries a tokenizer is larger than a model's vocabulary: tokens that were added to it.

    Args:
        config: The model's configuration.
        tokenizer: The tokenizer.
        where: The model, for messages.

    Raises:
        CheckpointError: The tokenizer's own vocabulary, without what was added, is larger: it is another model's. Or
            it lacks tokens that the model was trained with.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{where} has embeddings for {config.vocab_size:,} tokens, and its tokenizer a vocabulary of "
            f"{tokenizer.vocab_size:,}: it is another model's tokenizer. Put the model's own tokenizer files there."
        )
    if config.mm_use_im_start_end and IM_START_TOKEN not in tokenizer.get_vocab():
        raise CheckpointError(_lacks_tokens(where, "mm_use_im_start_end"))
    return max(0, len(tokenizer) - config.vocab_size)


def check_added_tokens(base: ModelSpec, num_tokens: int, num_added: int) -> None:
    """Refuse tokens that would get rows of the vocabulary that are there already: only new rows are trained.

    Of the tokenizer's `num_tokens` entries, `num_added` were added for this run.

    Raises:
        CheckpointError: The model has more rows than its tokenizer has entries, as transformers pads them.
    """
    num_spare = base.config.vocab_size - (num_tokens - num_added)
    if num_added and num_spare > 0:
        raise CheckpointError(
            f"mm_use_im_start_end and mm_use_im_patch_token add {num_added} tokens, but {base.directory.path} has "
            f"{num_spare} rows more in its vocabulary than its tokenizer has entries. The tokens would take those, "
            "untrained. Leave the flags out, or use a base without such rows, such as liuhaotian/llava-v1.5-7b."
        )
    said = [key for key in ("mm_use_im_start_end", "mm_use_im_patch_token") if base.directory.config.get(key)]
    if num_added and said:
        raise CheckpointError(_lacks_tokens(base.directory.path, said[0]))


def _lacks_tokens(where: Path, flag: str) -> str:
    return (
        f"config.json in {where} says that it was trained with tokens of its own ({flag}), but its tokenizer lacks "
        "them. Copy the model's own tokenizer files there."
    )


def load_base(
    base: ModelSpec,
    *,
    num_new_rows: int = 0,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
    quantization: Quantization | None = None,
    division: Division | None = None,
    with_tower: bool = True,
) -> tuple[LlavaForCausalLM, Ledger]:
    """Build the model and read its weights.

    Args:
        base: What `find_model` found.
        num_new_rows: Entries that the tokenizer has beyond the model's vocabulary.
        dtype_of: The dtype in memory for a parameter name.
        device: Where the parameters are put.
        attn_implementation: Attention of the language model.
        quantization: How the language model's linear layers are held; 16 bits when absent. `dtype_of` then says in
            which dtype their products are computed.
        division: Divides the parameters among the ranks (ZeRO-3); see `load_weights`.
        with_tower: Whether the vision tower is loaded; without it the model takes `image_features` alone.

    Returns:
        The model, all of it frozen, and the ledger of what came from where.

    Raises:
        CheckpointError: A weight is missing, damaged or of another shape.
    """
    config = base.config
    config.vocab_size += num_new_rows
    model = build_skeleton(config, attn_implementation=attn_implementation)
    if model.has_vision:
        assert isinstance(model.model.vision_tower, VisionTower)
        # Under ZeRO-3 all ranks have to run the same modules equally often, however many images each has.
        model.model.vision_tower.one_at_a_time = division is None and torch.device(device).type == "cpu"
    sources = base.sources
    if not with_tower and model.has_vision:
        model.runs_tower = False
        del model.model.vision_tower
        sources = tuple(_only(source, lambda name: module_part(name) != "vision tower") for source in sources)
    if quantization is not None:
        quantize_linears(model, quantization, dtype_of)
    ledger = load_weights(
        model,
        sources,
        dtype_of=dtype_of,
        new_modules=[*(["model.mm_projector"] * base.projector_is_new), *([IMAGE_NEWLINE] * base.newline_is_new)],
        num_new_rows=num_new_rows,
        device=device,
        division=division,
    )
    check_quantized(model, quantization)
    if base.token_rows is not None:
        weight = model.get_parameter(EMBEDDINGS)
        with division.whole(weight) if division is not None else nullcontext():
            _load_token_rows(weight, base.token_rows, num_new_rows)
    return model, ledger


def load_tower(base: ModelSpec, *, dtype: torch.dtype, device: torch.device | str) -> VisionTower:
    """Load the vision tower alone, frozen.

    Raises:
        CheckpointError: A weight is missing, damaged or of another shape.
    """
    tower = build_skeleton(base.config).model.vision_tower
    assert isinstance(tower, VisionTower)
    tower.one_at_a_time = torch.device(device).type == "cpu"
    alone: Any = nn.Module()  # the tower under the names that it has in a model
    alone.config = SimpleNamespace(tie_word_embeddings=False)
    alone.model = nn.Module()
    alone.model.vision_tower = tower
    sources = [_only(source, lambda name: module_part(name) == "vision tower") for source in base.sources]
    load_weights(alone, sources, dtype_of=lambda _: dtype, device=device)
    return tower.to(device).eval()


def _check_whole_projector(sources: Sequence[WeightSource], extra_sources: Sequence[WeightSource]) -> None:
    """Refuse a part of a projector, which the base's would complete: a projector is trained whole."""

    def projector(of: Sequence[WeightSource]) -> set[str]:
        return {name for source in of for name in source.names.values() if module_part(name) == "projector"}

    given, of_base = projector(extra_sources), projector(sources)
    missing = sorted(of_base - given)
    if given and missing and given <= of_base:
        raise CheckpointError(
            f"{extra_sources[0].files.path} holds {len(given)} tensors of a projector and not {some_of(missing)}; the "
            "base's would take their place, untrained. Is the file complete?"
        )


def _check_tied_head(base: WeightSource) -> None:
    """Refuse a head that would not be used: files of models whose head is the embeddings may hold it twice."""
    keys = {name: key for key, name in base.names.items()}
    if HEAD not in keys or EMBEDDINGS not in keys:
        return
    embeddings, head = (next(base.files.stream([keys[name]]))[1] for name in (EMBEDDINGS, HEAD))
    if not torch.equal(embeddings, head):
        raise CheckpointError(
            f"{base.files.path} holds a {HEAD} of its own, which its config.json (tie_word_embeddings) does not use. "
            "Does config.json belong to these weights?"
        )


def _find_tower(name: str, need: Need, cache_dir: str | None, base: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return a vision tower's directory and `config.json`; its weights may be in the base's files."""
    if need == "config":
        found = find_model_directory(name, need, cache_dir=cache_dir, relative_to=base)
        return found.path, found.config
    path = resolve_model_path(name, cache_dir=cache_dir, relative_to=base)
    return path, read_config(path)[0]


def _open_projector(path: Path, config: LlavaModelConfig) -> tuple[WeightSource, WeightFiles | None]:
    if not path.is_file():
        raise CheckpointError(f"The projector file {path} does not exist.")
    if config.mm_vision_config is None:
        raise CheckpointError(f"The projector file {path} is of no use to a text-only model. Add --vision_tower.")
    files = WeightFiles.open(path)
    names = {key: native_name(key) for key in files.tensors}
    projector = {key: name for key, name in names.items() if module_part(name) == "projector"}
    if not projector:
        raise CheckpointError(
            f"{path} holds no projector: none of its {len(names)} tensors is named mm_projector. "
            f"The first are {', '.join(list(names)[:3])}."
        )
    for key, name in names.items():
        if name == IMAGE_NEWLINE and config.has_image_newline:
            projector[key] = name
        elif name == IMAGE_NEWLINE:
            logger.info("%s of %s is not used with mm_patch_merge_type=%s.", name, path, config.mm_patch_merge_type)
    has_rows = EMBEDDINGS in names.values()
    return WeightSource("projector", files, projector, must_fit=True), files if has_rows else None


def _only(source: WeightSource, is_wanted: Callable[[str], bool]) -> WeightSource:
    names = {key: name for key, name in source.names.items() if is_wanted(name)}
    return WeightSource(source.label, source.files, names, source.must_fit)


def _load_token_rows(weight: torch.Tensor, files: WeightFiles, num_new_rows: int) -> None:
    """Take the rows of added tokens from a projector file, which holds them alone or, in old files, all rows."""
    key = next(key for key in files.tensors if native_name(key) == EMBEDDINGS)
    rows = files.read([key])[key]
    if rows.shape != weight.shape and rows.shape[0] != num_new_rows:
        raise CheckpointError(
            f"{files.path} holds {rows.shape[0]} embedding rows, but {num_new_rows} tokens were added. Were "
            "mm_use_im_start_end and mm_use_im_patch_token the same when the projector was pretrained?"
        )
    if num_new_rows:
        weight.data[-num_new_rows:] = rows[-num_new_rows:].to(weight.dtype)
