"""A model in transformers' own layout: `LlavaForConditionalGeneration`, or `LlavaNextForConditionalGeneration`.

The tensors are written under the names of llava-hf's checkpoints on the hub, which every version of transformers reads,
and vLLM and SGLang too. One thing is added: a row for `<image>`, the mean of the others, at the end of the vocabulary;
there is no row where the tokenizer has fewer entries than the matrices. Everything else is as it was, to the bit.

Images become pixels by the processor that prepares them as training did:

| `image_aspect_ratio` | image processor |
| --- | --- |
| square | `CLIPImageProcessor`: shorter edge resized, centre cropped |
| pad | `LlavaImageProcessor` with `do_pad`: put on a square of the mean colour first |
| anyres | `LlavaNextImageProcessor`: an overview and the tiles of a grid |
"""

import copy
from pathlib import Path
from typing import Any, Final, cast

import torch

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.hf.config import hf_fields
from llava_ft.checkpoint.hf.names import hub_name
from llava_ft.checkpoint.load import fit_rows
from llava_ft.checkpoint.names import CONFIG, EMBEDDINGS, GENERATION_CONFIG, HEAD, PREPROCESSOR_CONFIG
from llava_ft.checkpoint.save import Layout, ShardWriter, check_space, layout_bytes, write_json
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.constants import IMAGE_TOKEN
from llava_ft.conversation import TemplateStyle, get_template
from llava_ft.convert.chat_template import chat_template
from llava_ft.convert.hf_tokenizer import begin_separator, image_token_id, write_hf_tokenizer
from llava_ft.convert.native_record import write_native_record
from llava_ft.convert.proof import ConversionReport, prove_tensors
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.data.images import ImageTransform
from llava_ft.errors import CheckpointError
from llava_ft.geometry import ImageGeometry
from llava_ft.inference.load import DEFAULT_TEMPLATE
from llava_ft.json_files import read_json

CHAT_TEMPLATE: Final = "chat_template.jinja"
CHAT_TEMPLATE_WITH_BEGIN: Final = "chat_template_with_bos.jinja"
PROCESSOR_CONFIG: Final = "processor_config.json"


def export_hf(
    whole: FullModel, target: Path, report: ConversionReport, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    """Write a model in transformers' layout into an empty directory, and prove its tensors.

    Weights get the type `dtype`, or keep the base's when it is None.

    Raises:
        UserError: The layout cannot hold the model, or the disk has no room for it.
        RunError: What is on disk afterwards is not what was to be written.
    """
    hf_config(whole, dtype or whole.dtype)  # what the layout cannot hold is refused before weights are read
    settings, geometry = image_settings(whole)
    if geometry.aspect_ratio != "square" and (not settings.do_resize or "shortest_edge" not in settings.size):
        raise CheckpointError(
            f"image_aspect_ratio is {geometry.aspect_ratio}, and {PREPROCESSOR_CONFIG} has do_resize "
            f"{str(settings.do_resize).lower()} and size {settings.size}. transformers' processor of that kind needs "
            "do_resize with a shortest_edge. Keep the native layout."
        )
    num_rows = _num_rows(whole)
    layout: Layout = {
        hub_name(name): ((num_rows, *shape[1:]) if name in (EMBEDDINGS, HEAD) else shape, on_disk)
        for name, (shape, on_disk) in whole.layout(dtype, with_tower=True).items()
    }
    check_space(target, layout_bytes(layout))
    writer = ShardWriter(target, layout, max_shard_bytes=max_shard_bytes)
    for piece in whole.stream(dtype, with_tower=True):
        value = piece.value
        if piece.name in (EMBEDDINGS, HEAD):
            value = fit_rows(value, (num_rows, *value.shape[1:]))
        report.count(piece)
        writer.add(hub_name(piece.name), value)
    writer.finish()
    report.notes += write_hf_files(whole, target, dtype)
    native = {hub_name(name): name for name in whole.names(with_tower=True)}
    write_native_record(target, whole, native)
    written = ((native.get(key, key), tensor) for key, tensor in WeightFiles.open(target).stream(may_be_nan=True))
    prove_tensors(report, whole, written, native.values())


def write_hf_files(whole: FullModel, target: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Write everything that a model of transformers' layout has beside its weights.

    Returns:
        What a reader of the report should know.
    """
    write_json(target / CONFIG, hf_config(whole, dtype or whole.dtype))
    # The source's, or the ids of the special tokens, as the language model's configuration has them.
    file, config = whole.base.directory.path / GENERATION_CONFIG, cast("Any", whole.config)
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = read_json(file) if file.is_file() else {}
    write_json(target / GENERATION_CONFIG, {key: value for key, value in ids.items() if value is not None} | known)
    image_id = write_hf_tokenizer(whole.tokenizer, target)
    assert image_id == image_token_id(whole.tokenizer)
    (settings, geometry), tower = image_settings(whole), whole.config.tower_facts
    assert tower is not None
    fields = {
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": tower.patch_size,
        "processor_class": write_image_processor(target, settings, geometry),
        "vision_feature_select_strategy": "full" if whole.config.mm_vision_select_feature == "cls_patch" else "default",
    }
    write_json(target / PROCESSOR_CONFIG, fields)
    notes: list[str] = []
    if not whole.config.conversation_template:
        notes.append(f"the configuration names no template; {DEFAULT_TEMPLATE} is taken")
    tokenizer, mm_use_im_start_end = whole.tokenizer, whole.config.mm_use_im_start_end
    template = get_template(whole.config.conversation_template or DEFAULT_TEMPLATE)
    text = chat_template(template, mm_use_im_start_end=mm_use_im_start_end)
    (target / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    notes.append(f"chat template: {template.name}")
    if template.style is TemplateStyle.PLAIN:
        notes.append("template plain is that of projector pretraining: no conversation")
    else:
        if template.stop != tokenizer.eos_token:
            notes.append(
                f"an answer of template {template.name} ends with {template.stop!r}, which is not the tokenizer's end "
                f"token ({tokenizer.eos_token!r}): give it to a server as a stop string"
            )
        separator = begin_separator(tokenizer, template.prompt([("human", "x")]))
        if separator is not None:
            text = chat_template(template, mm_use_im_start_end=mm_use_im_start_end, begin=separator)
            (target / CHAT_TEMPLATE_WITH_BEGIN).write_text(text, encoding="utf-8")
    is_added = _num_rows(whole) > whole.config.vocab_size
    added = "a row for it was added, the mean of the others" if is_added else "it has a row"
    return [*notes, f"<image> is token {image_id}; {added}"]


def write_image_processor(directory: Path, settings: ImageProcessorSettings, geometry: ImageGeometry) -> str:
    """Write `preprocessor_config.json` alone, and return the name of the processor's class."""
    name = "LlavaNextProcessor" if geometry.needs_image_sizes else "LlavaProcessor"
    fields = settings.to_dict()
    if geometry.needs_image_sizes:
        pinpoints = [[height, width] for width, height in geometry.grid_pinpoints]
        fields |= {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints, "do_pad": True}
    elif geometry.aspect_ratio == "pad":
        fields |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    write_json(directory / PREPROCESSOR_CONFIG, fields | {"processor_class": name})
    return name


def image_settings(whole: FullModel) -> tuple[ImageProcessorSettings, ImageGeometry]:
    """Return how a model's images are prepared.

    Raises:
        UserError: The settings do not belong to the model's tower.
    """
    geometry, directory = whole.config.image_geometry, whole.base.vision_directory
    assert geometry is not None
    assert directory is not None
    ImageTransform.from_pretrained(directory, geometry=geometry)  # refuses what does not fit
    return ImageProcessorSettings.from_pretrained(directory), geometry


def _num_rows(whole: FullModel) -> int:
    """Rows of embeddings and head with the one of `<image>`."""
    return max(whole.config.vocab_size, image_token_id(whole.tokenizer) + 1)


def hf_config(whole: FullModel, dtype: torch.dtype) -> dict[str, Any]:
    """Return the `config.json` of a model in transformers' layout, the row of `<image>` counted.

    Raises:
        CheckpointError: The layout cannot hold the model.
    """
    config = copy.deepcopy(whole.config)
    config.vocab_size = _num_rows(whole)
    return hf_fields(config, image_token_id=image_token_id(whole.tokenizer), dtype=dtype)
