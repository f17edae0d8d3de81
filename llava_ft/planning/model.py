"""The run's model without a weight: found by its `config.json`, built from shapes, and what its parts hold.

A plan is often made on a machine that has not got the model. So a directory with nothing but `config.json` is enough,
and the architectures of LLaVA v1.5, of v1.6 on Vicuna and of what they are made from are known here, as the models'
own `config.json` has them.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.directory import read_config
from llava_ft.checkpoint.names import ADAPTER_CONFIG, CONFIG, PROJECTOR_BIN, PROJECTOR_SAFETENSORS
from llava_ft.errors import CheckpointError
from llava_ft.models.builder import build_skeleton
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.parts import part_of
from llava_ft.planning.quantized import stored_bytes
from llava_ft.planning.request import PlanRequest
from llava_ft.resolve import config_from_files, settle_base, start_of
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.quant import is_quantized, quantize_linears


def _vicuna(hidden_size: int, intermediate_size: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), depth),
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
    }


_LLAMA_7B: Final = _vicuna(4096, 11008, 32)
_LLAMA_13B: Final = _vicuna(5120, 13824, 40)
_LLAVA_V1_5: Final = {
    "model_type": "llava_llama",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
}
_LLAVA_V1_6: Final = _LLAVA_V1_5 | {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "mm_patch_merge_type": "spatial_unpad",
    "unfreeze_mm_vision_tower": True,
}
PUBLISHED: Final[Mapping[str, Mapping[str, Any]]] = {
    "lmsys/vicuna-7b-v1.5": _LLAMA_7B,
    "lmsys/vicuna-13b-v1.5": _LLAMA_13B,
    "liuhaotian/llava-v1.5-7b": _LLAMA_7B | _LLAVA_V1_5,
    "liuhaotian/llava-v1.5-13b": _LLAMA_13B | _LLAVA_V1_5,
    "liuhaotian/llava-v1.6-vicuna-7b": _LLAMA_7B | _LLAVA_V1_6,
    "liuhaotian/llava-v1.6-vicuna-13b": _LLAMA_13B | _LLAVA_V1_6,
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
}
"""Content of `config.json` by name on the hub, as far as it decides sizes."""


@dataclass(frozen=True)
class ModelOutline:
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
    config: LlavaModelConfig
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


def find_outline(args: ParsedArgs) -> ModelOutline:
    """Settle the configuration of the run's model from `config.json` files alone.

    Raises:
        UserError: A model is nowhere, is no LLaMA or CLIP, or a flag contradicts it.
    """
    args, start = settle_base(args), start_of(args)
    name, cache_dir = args.model.model_name_or_path, args.flags.cache_dir
    base, directory = _find_config(name, cache_dir, None)
    not_here = [name] * (directory is None)
    if directory is not None:
        _refuse_what_is_no_base(directory)

    def read_tower(tower: str) -> Mapping[str, Any]:
        fields, found = _find_config(tower, cache_dir, directory)
        not_here.extend([tower] * (found is None))
        return fields

    config = config_from_files(
        args,
        start,
        base,
        read_tower=read_tower,
        projector_is_replaced=bool(args.model.pretrain_mm_mlp_adapter) or start is not None,
    )
    tokens = {"mm_use_im_start_end": 2, "mm_use_im_patch_token": 1}  # a base that was trained with them has them
    return ModelOutline(
        name=name,
        config=config,
        num_new_rows=sum(count for key, count in tokens.items() if getattr(config, key) and not base.get(key)),
        directory=directory,
        notes=tuple(f"{part} is not on this machine; its published architecture is used." for part in not_here),
        merges_first=start is not None and start.mode == "merge_first",
    )


def build_model(outline: ModelOutline, request: PlanRequest) -> nn.Module:
    """Build the run's model on the meta device, as training builds it, with what is trained marked."""
    config = copy.deepcopy(outline.config)
    config.vocab_size += outline.num_new_rows
    model = build_skeleton(config, attn_implementation="eager" if request.attention == "eager" else "sdpa")
    if model.has_vision:
        model.runs_tower = request.tower == "runs"
        if request.tower == "absent":
            del model.model.vision_tower
    if request.quantization is not None:
        quantize_linears(model, request.quantization, lambda _: request.compute_dtype)
    request.tuning.separate_new_rows(model, outline.num_new_rows)
    result: nn.Module = model
    if request.lora is not None:
        with torch.device("meta"):
            result = add_lora(model, **asdict(request.lora))
    request.tuning.apply(result)
    model.config.use_cache = False
    return result


def parameter_shapes(model: nn.Module, request: PlanRequest) -> list[ParameterShape]:
    """List the parameters of a model that `build_model` made."""
    packed: dict[int, int] = {}
    for module in model.modules() if request.quantization is not None else ():
        if is_quantized(module):
            assert isinstance(module, nn.Linear)
            assert request.quantization is not None
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


def largest(shapes: Sequence[ParameterShape]) -> int:
    """Number of values of the largest parameter; 0 without any."""
    return max((shape.numel for shape in shapes), default=0)


def _find_config(name: str, cache_dir: str | None, relative_to: Path | None) -> tuple[Mapping[str, Any], Path | None]:
    """Find a model's `config.json`: in a directory, in the hub's local cache, in `PUBLISHED`, or on the hub.

    Returns:
        Its content, and its directory; None if it is that of `PUBLISHED`.

    Raises:
        CheckpointError: It is nowhere.
    """
    for candidate in (Path(name), *([relative_to / name] if relative_to else [])):
        if candidate.is_dir():
            if not (candidate / CONFIG).is_file():
                names = ", ".join(sorted(entry.name for entry in candidate.iterdir())[:8]) or "nothing"
                raise CheckpointError(
                    f"{candidate} has no {CONFIG}, which says what the model is made of. It holds {names}. Give the "
                    "directory of a whole model; an adapter goes into --lora_weight_path."
                )
            return read_config(candidate)[0], candidate
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"The model directory {name} does not exist. Give a directory with {CONFIG} in it.")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, CONFIG, cache_dir=cache_dir)
    if not isinstance(cached, str) and name in PUBLISHED:
        return PUBLISHED[name], None
    try:
        file = Path(cached if isinstance(cached, str) else hf_hub_download(name, CONFIG, cache_dir=cache_dir))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no directory here, and its {CONFIG} could not be fetched from the Hugging Face hub: "
            f"{str(error).splitlines()[0]}. Give a directory with {CONFIG} in it; weights are not needed to plan. "
            f"Known without any file are {', '.join(PUBLISHED)}."
        ) from None
    return read_config(file.parent)[0], file.parent


def _refuse_what_is_no_base(directory: Path) -> None:
    for files, what, rest in (
        ((ADAPTER_CONFIG,), "LoRA adapter", "Give its base model, and the adapter with --lora_weight_path."),
        (
            (PROJECTOR_BIN, PROJECTOR_SAFETENSORS),
            "projector",
            "Give its language model, and the projector with --pretrain_mm_mlp_adapter.",
        ),
    ):
        if any((directory / file).is_file() for file in files):
            raise CheckpointError(f"{directory} holds a {what} and no language model. {rest}")
