"""The run's model from shapes: the skeleton with adapters, added rows and quantised layers, and what its parts hold."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.names import ADAPTER_CONFIG, PROJECTOR_BIN, PROJECTOR_SAFETENSORS
from llava_ft.checkpoint.start import Start, find_start
from llava_ft.constants import CHECKPOINT_FIELDS
from llava_ft.errors import CheckpointError
from llava_ft.models.builder import build_skeleton, is_llava_config, settle_config, vision_fields
from llava_ft.models.config import LlavaLlamaConfig
from llava_ft.models.llava import LlavaLlamaForCausalLM, part_of
from llava_ft.planning.architectures import Architecture, find_architecture
from llava_ft.planning.quantized import stored_bytes
from llava_ft.planning.request import PlanRequest
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.quant import is_quantized, quantize_linears

PARTS: Final = (
    "embeddings",
    "language model",
    "head",
    "projector",
    "image newline",
    "vision tower",
    "LoRA",
    "new token rows",
)
"""Parts of the model in the order of the report; see `part_of`."""


@dataclass(frozen=True)
class PlannedModel:
    """A model known by its configuration.

    Attributes:
        name: As the request names it.
        config: The settled configuration, without rows of added tokens.
        num_new_rows: Entries that the run adds to the vocabulary.
        directory: Where the base model's `config.json` is, and perhaps a tokenizer; None if it is not here.
        notes: What the user should know about where the architecture is from.
        merges_first: Whether an adapter is merged into the base before it is trained.
    """

    name: str
    config: LlavaLlamaConfig
    num_new_rows: int
    directory: Path | None
    notes: tuple[str, ...] = ()
    merges_first: bool = False

    @property
    def has_vision(self) -> bool:
        """Whether it has a vision tower."""
        return self.config.mm_vision_config is not None

    @property
    def holds_vision_tower(self) -> bool:
        """Whether the model's files are known to hold a tower: original LLaVA notes that it was trained, as in v1.6."""
        return bool(self.config.to_dict().get("unfreeze_mm_vision_tower"))


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of the run's model.

    Attributes:
        name: Name in the model.
        part: Part of the model.
        shape: Shape of the values it stands for.
        is_trained: Whether it is trained.
        dtype: Type in memory without DeepSpeed; for quantised weights the compute dtype.
        packed_bytes: Bytes of a quantised weight with its scales; None if it is not quantised.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    is_trained: bool
    dtype: torch.dtype
    packed_bytes: int | None = None

    @property
    def numel(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()


def find_planned_model(args: ParsedArgs) -> PlannedModel:
    """Settle the configuration of the run's model from `config.json` files alone.

    Raises:
        UserError: A model is nowhere, is no LLaMA or CLIP, or a flag contradicts it.
    """
    start = _start_of(args)
    name = args.model.model_name_or_path if start is None else start.base_name(args.model.model_name_or_path)
    base = find_architecture(name, cache_dir=args.flags.cache_dir)
    _refuse_what_is_no_base(base)
    given: dict[str, Any] = {key: getattr(args.model, key, None) for key in CHECKPOINT_FIELDS}
    given |= {key: getattr(args.data, key) for key in ("image_aspect_ratio", "image_grid_pinpoints")}
    asked = {} if start is None else start.wishes()
    wishes = asked | {key: wish for key, wish in given.items() if wish is not None}
    named_tower = args.model.vision_tower or (start.vision_tower if start is not None else None)
    tower_name = named_tower or base.fields.get("mm_vision_tower")
    vision, tower = _vision(base, tower_name, args.model.vision_tower is not None, args.flags.cache_dir)
    config = settle_config(
        base.fields,
        name,
        wishes=wishes,
        vision_tower=tower_name,
        vision=vision,
        projector_is_replaced=bool(args.model.pretrain_mm_mlp_adapter) or start is not None,
    )
    notes = [
        f"{part} is not on this machine; its published architecture is used."
        for part, found in ((name, base), (tower_name, tower))
        if found is not None and found.is_published
    ]
    return PlannedModel(
        name=name,
        config=config,
        num_new_rows=_num_new_rows(config, base.fields),
        directory=base.directory,
        notes=tuple(notes),
        merges_first=start is not None and start.mode == "merge_first",
    )


def build_model(planned: PlannedModel, request: PlanRequest) -> nn.Module:
    """Build the run's model on the meta device, as training builds it, with what is trained marked."""
    config = copy.deepcopy(planned.config)
    config.vocab_size += planned.num_new_rows
    model = build_skeleton(config, attn_implementation="eager" if request.attention == "eager" else "sdpa")
    if model.has_vision:
        model.runs_tower = request.tower == "runs"
        if request.tower == "absent":
            del model.model.vision_tower
    if request.quantization is not None:
        quantize_linears(model, request.quantization, lambda _: request.compute_dtype)
    request.tuning.separate_new_rows(model, planned.num_new_rows)
    result: nn.Module = model
    if request.lora is not None:
        lora = request.lora
        with torch.device("meta"):
            result = add_lora(
                model,
                r=lora.r,
                alpha=lora.alpha,
                dropout=lora.dropout,
                bias=lora.bias,
                leaf_names=lora.leaf_names,
                fast=lora.fast,
            )
    request.tuning.apply(result)
    model.config.use_cache = False
    return result


def parameter_shapes(model: nn.Module, request: PlanRequest) -> list[ParameterShape]:
    """List the parameters of a model that `build_model` made."""
    packed: dict[int, int] = {}
    if request.quantization is not None:
        for module in model.modules():
            if is_quantized(module):
                assert isinstance(module, nn.Linear)
                size = stored_bytes(module.out_features, module.in_features, request.quantization)
                packed[id(module.weight)] = size
    return [
        ParameterShape(
            name=name,
            part=part_of(name),
            shape=tuple(parameter.shape),
            is_trained=parameter.requires_grad,
            dtype=request.tuning.dtype_of(name, request.compute_dtype),
            packed_bytes=packed.get(id(parameter)),
        )
        for name, parameter in model.named_parameters()
    ]


def native_model(model: nn.Module) -> LlavaLlamaForCausalLM:
    """Return the LLaVA model inside what PEFT wraps around it."""
    return next(module for module in model.modules() if isinstance(module, LlavaLlamaForCausalLM))


def _refuse_what_is_no_base(base: Architecture) -> None:
    directory = base.directory
    if directory is None:
        return
    if (directory / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{directory} holds a LoRA adapter and no language model. Give its base model, and the adapter with "
            "--lora_weight_path."
        )
    if any((directory / name).is_file() for name in (PROJECTOR_BIN, PROJECTOR_SAFETENSORS)):
        raise CheckpointError(
            f"{directory} holds a projector and no language model. Give its language model, and the projector with "
            "--pretrain_mm_mlp_adapter."
        )


def _start_of(args: ParsedArgs) -> Start | None:
    path, flag = args.flags.start
    if not path:
        return None
    flags = args.flags
    return find_start(path, flags.adapter_mode, trains_adapter=flags.lora_enable, flag=flag, cache_dir=flags.cache_dir)


def _vision(
    base: Architecture, tower_name: str | None, was_asked: bool, cache_dir: str | None
) -> tuple[dict[str, Any] | None, Architecture | None]:
    inside = base.fields.get("mm_vision_config")
    if inside and not was_asked:
        return vision_fields(inside, "the base model"), None
    if tower_name is None:
        if is_llava_config(base.fields):
            raise CheckpointError(
                "The base model is a LLaVA checkpoint that does not name its vision tower. Give it with --vision_tower."
            )
        return None, None
    tower = find_architecture(tower_name, cache_dir=cache_dir, relative_to=base.directory)
    return vision_fields(tower.fields, tower_name), tower


def _num_new_rows(config: LlavaLlamaConfig, base: Mapping[str, Any]) -> int:
    """Count the tokens that the run adds; a LLaVA base that was trained with them has them already."""
    tokens = {"mm_use_im_start_end": 2, "mm_use_im_patch_token": 1}
    return sum(count for key, count in tokens.items() if getattr(config, key) and not base.get(key))


def largest(shapes: Sequence[ParameterShape]) -> int:
    """Number of values of the largest parameter; 0 without any."""
    return max((shape.numel for shape in shapes), default=0)
