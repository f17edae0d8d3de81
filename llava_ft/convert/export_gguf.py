"""Export to llama.cpp: a GGUF file with the language model, and one with vision tower and projector ("mmproj").

The files are written tensor by tensor and read back: each tensor must be the source's, rounded once, and each key what
the configuration says. Memory holds a tensor or two, whatever the model's size.

Read back as a model (`load_gguf`), the configuration is made from the files' keys and the weights from their tensors,
so that a wrong key shows in the logits as a wrong tensor does.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.save import check_space
from llava_ft.conversation import TemplateStyle, get_template
from llava_ft.convert.chat_template import chat_template
from llava_ft.convert.gguf_file import (
    DTYPES,
    Fields,
    File,
    GgufContent,
    GgufTensor,
    import_gguf,
    plan_tensors,
    round_once,
    write_gguf,
)
from llava_ft.convert.gguf_metadata import (
    check_expressible,
    check_image_settings,
    differences,
    language_fields,
    vision_fields,
)
from llava_ft.convert.gguf_vocabulary import check_ids, read_vocabulary, vocabulary_fields
from llava_ft.convert.proof import ConversionReport, prove_tensors
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.data.images import ImageTransform
from llava_ft.errors import CheckpointError, RunError, UserError
from llava_ft.inference.load import DEFAULT_TEMPLATE, LoadedModel
from llava_ft.models.builder import build_skeleton
from llava_ft.models.families.llama import LlavaLlamaConfig

logger = logging.getLogger(__name__)

ARCHITECTURES: dict[File, str] = {"language": "llama", "vision": "clip"}
MMPROJ_PREFIX = "mmproj-"


def export_gguf(whole: FullModel, target: Path, report: ConversionReport, dtype: torch.dtype | None = None) -> None:
    """Write a model as llama.cpp reads it into an existing directory, and compare the files with the model.

    Weights get the type `dtype`, float32, float16 or bfloat16, or the base's when it is None.

    Raises:
        UserError: llama.cpp cannot run such a model, or GGUF has no such type.
        RunError: A file does not hold what it should.
    """
    # What GGUF or llama.cpp cannot hold is refused before weights are read.
    config = whole.config
    dtype = dtype or whole.dtype
    if dtype not in DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise UserError(
            f"A GGUF file cannot be written in {str(dtype).removeprefix('torch.')}: the exported types are {known}. "
            "Smaller ones are made from such a file with llama.cpp's llama-quantize."
        )
    check_expressible(config)
    import_gguf()
    vocabulary = read_vocabulary(whole.tokenizer, whole.shapes["model.embed_tokens.weight"][0])
    check_ids(vocabulary, whole.tokenizer)
    template_text, template_notes = _template(whole)
    source = whole.directory.path.resolve()  # a checkpoint is named after the run's directory as well
    name = f"{source.parent.name}-{source.name}" if source.name.startswith("checkpoint-") else source.name
    name = "-".join(name.split()) or "model"
    fields: dict[File, Fields] = {
        "language": language_fields(config, name, dtype) | vocabulary_fields(vocabulary, whole.tokenizer, template_text)
    }
    paths: dict[File, Path] = {"language": target / f"{name}-{DTYPES[dtype]}.gguf"}
    if whole.base.vision_directory is not None:
        settings = ImageProcessorSettings.from_pretrained(whole.base.vision_directory)
        check_image_settings(settings)
        fields["vision"] = vision_fields(config, settings, name, dtype)
        paths["vision"] = target / f"{MMPROJ_PREFIX}{paths['language'].name}"
    plan = plan_tensors(whole.shapes, config, dtype)
    notes = [*differences(config), *template_notes]
    for note in notes:
        logger.warning("GGUF: %s.", note)
    report.notes += notes
    check_space(target, sum(tensor.num_bytes for tensor in plan))

    def value_of(tensor: GgufTensor) -> torch.Tensor:
        found = whole.tensor(tensor.native, torch.float32)
        rounded = round_once(found.value, tensor)
        report.count(replace(found, value=rounded))
        return rounded

    files: dict[File, GgufContent] = {}
    for file, path in paths.items():
        tensors = [tensor for tensor in plan if tensor.file == file]
        write_gguf(path, ARCHITECTURES[file], fields[file], tensors, value_of)
        files[file] = content = GgufContent(path)
        for key, value in {"general.architecture": ARCHITECTURES[file], **fields[file]}.items():
            if content.fields.get(key) != value:
                raise RunError(f"{path} says {key} = {content.fields.get(key)!r}, and not {value!r}.")
        written = {(name, content.shape(name), content.dtype(name)) for name in content.names}
        odd = sorted(name for name, _, _ in written ^ {(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors})
        if odd:
            raise RunError(f"{path} does not hold the tensors it should: {', '.join(odd[:4])}. Nothing was kept.")
    read = ((tensor.native, files[tensor.file].read(tensor.name, tensor.num_heads)) for tensor in plan)
    names = {tensor.native for tensor in plan}
    prove_tensors(report, whole, read, [name for name in whole.names(with_tower=True) if name in names])


def _template(whole: FullModel) -> tuple[str | None, list[str]]:
    """Return the chat template, and in what llama.cpp writes or ends a conversation otherwise than in training."""
    template = get_template(whole.config.conversation_template or DEFAULT_TEMPLATE)
    if template.style is TemplateStyle.PLAIN:
        return None, ["the model was trained with template plain, which has no turns: the file holds no chat template"]
    notes: list[str] = []
    if whole.config.conversation_template is None:
        notes.append(f"the model does not name its template: the chat template is that of {template.name}")
    if template.stop != "</s>":
        notes.append(f"answers in template {template.name} end with {template.stop!r}: give llama.cpp that stop text")
    elif not getattr(whole.tokenizer, "legacy", True):
        notes.append(
            "from the second question on llama.cpp puts a blank behind </s>, which this tokenizer (legacy=false) does "
            "not"
        )
    return chat_template(template, mm_use_im_start_end=whole.config.mm_use_im_start_end), notes


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

    Of the model that was exported, the tokenizer and the images' size are taken.

    Raises:
        CheckpointError: The directory does not hold one exported model.
    """
    language_file, vision_file = find_files(directory)
    language = GgufContent(language_file)
    vision = None if vision_file is None else GgufContent(vision_file)
    config = _config(language, vision)
    model = build_skeleton(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    values: dict[str, torch.Tensor] = {}
    for tensor in plan_tensors(shapes, config, torch.float32):
        content = language if tensor.file == "language" else vision
        if content is None or tensor.name not in content.names:
            raise CheckpointError(f"The GGUF files in {directory} hold no {tensor.name}. Export the model again.")
        values[tensor.native] = content.read(tensor.name, tensor.num_heads).to(dtype)
    for name in shapes.keys() - values:  # the tower's last norm, which is never run
        values[name] = torch.ones(shapes[name], dtype=dtype)
    model.load_state_dict(values, strict=False, assign=True)  # strict but for buffers, which no file holds
    transform = None
    if vision is not None:
        assert full.base.vision_directory is not None
        settings = replace(
            ImageProcessorSettings.from_pretrained(full.base.vision_directory),
            image_mean=tuple(vision.fields["clip.vision.image_mean"]),
            image_std=tuple(vision.fields["clip.vision.image_std"]),
        )
        transform = ImageTransform(settings, geometry=config.image_geometry)
    return LoadedModel(
        tokenizer=full.tokenizer,
        model=model.eval(),
        image_transform=transform,
        template=full.config.conversation_template or DEFAULT_TEMPLATE,
        context_len=config.max_position_embeddings,
        base=full.base,
    )


def _config(language: GgufContent, vision: GgufContent | None) -> LlavaLlamaConfig:
    keys = language.fields
    rope: dict[str, Any] = {"rope_theta": keys["llama.rope.freq_base"], "rope_type": "default"}
    if "llama.rope.scaling.type" in keys:
        rope |= {"rope_type": keys["llama.rope.scaling.type"], "factor": keys["llama.rope.scaling.factor"]}
    bias = [f"blk.0.{part}.bias" in language.names for part in ("attn_q", "ffn_up")]
    vision_keys: dict[str, Any] = {}
    if vision is not None:
        clip = vision.fields
        flat: list[int] = clip.get("clip.vision.image_grid_pinpoints") or []
        vision_keys = {
            "mm_vision_tower": "gguf",
            "mm_vision_config": {
                "hidden_size": clip["clip.vision.embedding_length"],
                "intermediate_size": clip["clip.vision.feed_forward_length"],
                "num_hidden_layers": clip["clip.vision.block_count"],
                "num_attention_heads": clip["clip.vision.attention.head_count"],
                "image_size": clip["clip.vision.image_size"],
                "patch_size": clip["clip.vision.patch_size"],
                "hidden_act": "gelu" if clip["clip.use_gelu"] else "quick_gelu",
                "layer_norm_eps": clip["clip.vision.attention.layer_norm_epsilon"],
            },
            "mm_hidden_size": clip["clip.vision.embedding_length"],
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": clip["clip.vision.feature_layer"][0],
            "mm_vision_select_feature": "patch",
            "image_aspect_ratio": clip["clip.vision.image_aspect_ratio"],
            "mm_patch_merge_type": clip["clip.vision.mm_patch_merge_type"],
            "image_grid_pinpoints": [flat[start : start + 2] for start in range(0, len(flat), 2)] or None,
        }
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
        **vision_keys,
    )
