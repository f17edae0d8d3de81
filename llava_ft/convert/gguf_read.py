"""Reading the two GGUF files back as a model: what a file says and holds, and nothing else.

This is the other half of the proof of an export. The configuration is made from the files' keys and the weights from
their tensors, so a wrong key shows in the logits as a wrong tensor does.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.weights import TensorInfo, WeightFiles
from llava_ft.convert.gguf_file import GgufContent
from llava_ft.convert.gguf_tensors import File, GgufTensor, plan_tensors
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.data.images import ImageTransform
from llava_ft.errors import CheckpointError
from llava_ft.inference.load import DEFAULT_TEMPLATE, LoadedModel
from llava_ft.models.builder import build_skeleton
from llava_ft.models.config import LlavaLlamaConfig
from llava_ft.models.llava import LlavaLlamaForCausalLM

MMPROJ_PREFIX = "mmproj-"


class GgufWeights(WeightFiles):
    """The tensors of both files under native names, rows as in PyTorch.

    What is not exported, the end of the vision tower, is taken from the source, so that the whole can be compared with
    it as any other result.

    Args:
        directory: Where the files are.
        files: The files.
        plan: The tensors in them.
        whole: The source.
    """

    def __init__(
        self, directory: Path, files: Mapping[File, GgufContent], plan: Sequence[GgufTensor], whole: FullModel
    ):
        self._files = files
        self._plan = {tensor.native: tensor for tensor in plan}
        self._whole = whole
        super().__init__(
            directory,
            {
                name: TensorInfo(directory, whole.shapes[name], self._dtype(name))
                for name in whole.names(with_tower=True)
            },
        )

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors."""
        for name in self.tensors if names is None else names:
            tensor = self._plan.get(name)
            if tensor is None:
                yield name, self._whole.tensor(name).value
            else:
                yield name, self._files[tensor.file].read(tensor.name, tensor.num_heads)

    def _dtype(self, name: str) -> torch.dtype:
        return self._plan[name].dtype if name in self._plan else self._whole.dtype


def find_files(directory: Path) -> tuple[Path, Path | None]:
    """Return the language model's file in a directory and the one with tower and projector, if there is one.

    Raises:
        CheckpointError: There is not exactly one of the first, or more than one of the second.
    """
    files = sorted(directory.glob("*.gguf"))
    vision = [path for path in files if path.name.startswith(MMPROJ_PREFIX)]
    language = [path for path in files if path not in vision]
    if len(language) != 1 or len(vision) > 1:
        raise CheckpointError(
            f"{directory} holds {len(language)} language models and {len(vision)} files with a projector; expected are "
            f"one NAME.gguf and at most one {MMPROJ_PREFIX}NAME.gguf. Give a directory with one model in it."
        )
    return language[0], vision[0] if vision else None


def load_gguf(directory: Path, full: FullModel, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load what an export wrote: weights, configuration and image normalisation from the GGUF files alone.

    Args:
        directory: Where the files are.
        full: The model that was exported; its tokenizer and its images' size are taken.
        dtype: Type of the weights in memory.

    Raises:
        CheckpointError: The directory does not hold one exported model.
    """
    model = read_model(directory, dtype)
    vision_file = find_files(directory)[1]
    transform = None
    if vision_file is not None:
        assert full.base.vision_directory is not None
        keys = GgufContent(vision_file).fields
        settings = replace(
            ImageProcessorSettings.from_pretrained(full.base.vision_directory),
            image_mean=tuple(keys["clip.vision.image_mean"]),
            image_std=tuple(keys["clip.vision.image_std"]),
        )
        transform = ImageTransform(settings, geometry=model.config.image_geometry)
    return LoadedModel(
        tokenizer=full.tokenizer,
        model=model,
        image_transform=transform,
        template=full.config.conversation_template or DEFAULT_TEMPLATE,
        context_len=model.config.max_position_embeddings,
        base=full.base,
    )


def read_model(directory: Path, dtype: torch.dtype = torch.float32) -> LlavaLlamaForCausalLM:
    """Build the model that a directory's GGUF files hold.

    Args:
        directory: The directory.
        dtype: Type of the weights in memory.

    Raises:
        CheckpointError: A tensor is missing or there are no such files.
    """
    language_file, vision_file = find_files(directory)
    language = GgufContent(language_file)
    vision = None if vision_file is None else GgufContent(vision_file)
    config = _config(language, vision)
    model = build_skeleton(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for tensor in plan_tensors(shapes, config, torch.float32):
        content = language if tensor.file == "language" else vision
        if content is None or tensor.name not in content.names:
            raise CheckpointError(f"The GGUF files in {directory} hold no {tensor.name}. Export the model again.")
        _assign(model, tensor.native, content.read(tensor.name, tensor.num_heads).to(dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:  # the tower's last norm, which is never run
            _assign(model, name, torch.ones(parameter.shape, dtype=dtype))
    return model.eval()


def _config(language: GgufContent, vision: GgufContent | None) -> LlavaLlamaConfig:
    keys = language.fields
    rope: dict[str, Any] = {"rope_theta": keys["llama.rope.freq_base"], "rope_type": "default"}
    if "llama.rope.scaling.type" in keys:
        rope |= {"rope_type": keys["llama.rope.scaling.type"], "factor": keys["llama.rope.scaling.factor"]}
    bias = [f"blk.0.{part}.bias" in language.names for part in ("attn_q", "ffn_up")]
    return LlavaLlamaConfig(
        vocab_size=keys["llama.vocab_size"],
        max_position_embeddings=keys["llama.context_length"],
        hidden_size=keys["llama.embedding_length"],
        num_hidden_layers=keys["llama.block_count"],
        intermediate_size=keys["llama.feed_forward_length"],
        num_attention_heads=keys["llama.attention.head_count"],
        num_key_value_heads=keys["llama.attention.head_count_kv"],
        head_dim=keys["llama.attention.key_length"],
        rms_norm_eps=keys["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters=rope,
        attention_bias=bias[0],
        mlp_bias=bias[1],
        tie_word_embeddings=False,
        bos_token_id=keys.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=keys.get("tokenizer.ggml.eos_token_id"),
        **({} if vision is None else _vision_config(vision.fields)),
    )


def _vision_config(keys: dict[str, Any]) -> dict[str, Any]:
    flat: list[int] = keys.get("clip.vision.image_grid_pinpoints") or []
    return {
        "mm_vision_tower": "gguf",
        "mm_vision_config": {
            "hidden_size": keys["clip.vision.embedding_length"],
            "intermediate_size": keys["clip.vision.feed_forward_length"],
            "num_hidden_layers": keys["clip.vision.block_count"],
            "num_attention_heads": keys["clip.vision.attention.head_count"],
            "image_size": keys["clip.vision.image_size"],
            "patch_size": keys["clip.vision.patch_size"],
            "hidden_act": "gelu" if keys["clip.use_gelu"] else "quick_gelu",
            "layer_norm_eps": keys["clip.vision.attention.layer_norm_epsilon"],
        },
        "mm_hidden_size": keys["clip.vision.embedding_length"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": keys["clip.vision.feature_layer"][0],
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": keys["clip.vision.image_aspect_ratio"],
        "mm_patch_merge_type": keys["clip.vision.mm_patch_merge_type"],
        "image_grid_pinpoints": [flat[start : start + 2] for start in range(0, len(flat), 2)] or None,
    }


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
