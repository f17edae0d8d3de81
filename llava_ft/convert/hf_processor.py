"""The files that `AutoProcessor` reads: how images become pixels, how text becomes ids, and the chat template.

| `image_aspect_ratio` | image processor |
| --- | --- |
| square | `CLIPImageProcessor`: shorter edge resized, centre cropped |
| pad | `LlavaImageProcessor` with `do_pad`: put on a square of the mean colour first |
| anyres | `LlavaNextImageProcessor`: an overview and the tiles of a grid |
"""

from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from llava_ft.checkpoint.names import PREPROCESSOR_CONFIG
from llava_ft.checkpoint.save import write_json
from llava_ft.constants import IMAGE_TOKEN
from llava_ft.conversation import TemplateStyle, get_template
from llava_ft.convert.chat_template import chat_template
from llava_ft.convert.hf_tokenizer import begin_separator
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.errors import CheckpointError
from llava_ft.geometry import ImageGeometry
from llava_ft.models.config import LlavaLlamaConfig

CHAT_TEMPLATE: Final = "chat_template.jinja"
CHAT_TEMPLATE_WITH_BEGIN: Final = "chat_template_with_bos.jinja"
PROCESSOR_CONFIG: Final = "processor_config.json"


def check_images(settings: ImageProcessorSettings, geometry: ImageGeometry) -> None:
    """Refuse image settings that transformers' processors cannot follow.

    Raises:
        CheckpointError: They cannot.
    """
    if geometry.aspect_ratio != "square" and (not settings.do_resize or "shortest_edge" not in settings.size):
        raise CheckpointError(
            f"image_aspect_ratio is {geometry.aspect_ratio}, and {PREPROCESSOR_CONFIG} has do_resize "
            f"{str(settings.do_resize).lower()} and size {settings.size}. transformers' processor of that kind needs "
            "do_resize with a shortest_edge. Keep the native layout."
        )


def write_processor(
    directory: Path,
    config: LlavaLlamaConfig,
    settings: ImageProcessorSettings,
    tokenizer: PreTrainedTokenizerFast,
    template_name: str,
) -> list[str]:
    """Write the processor's files and the chat template.

    Args:
        directory: Where to.
        config: The model's configuration.
        settings: How its images are prepared.
        tokenizer: Our tokenizer.
        template_name: Conversation template the model was trained with.

    Returns:
        What a reader of the report should know.
    """
    geometry = config.image_geometry
    assert geometry is not None
    name = write_image_processor(directory, settings, geometry)
    fields = {
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": geometry.patch_size,
        "processor_class": name,
        "vision_feature_select_strategy": "full" if geometry.select_feature == "cls_patch" else "default",
    }
    write_json(directory / PROCESSOR_CONFIG, fields)
    return _write_chat_templates(directory, tokenizer, template_name, config.mm_use_im_start_end)


def write_image_processor(directory: Path, settings: ImageProcessorSettings, geometry: ImageGeometry) -> str:
    """Write `preprocessor_config.json` alone, and return the name of the processor's class."""
    name = "LlavaNextProcessor" if geometry.needs_image_sizes else "LlavaProcessor"
    fields = image_processor_fields(settings, geometry) | {"processor_class": name}
    write_json(directory / PREPROCESSOR_CONFIG, fields)
    return name


def image_processor_fields(settings: ImageProcessorSettings, geometry: ImageGeometry) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json` for transformers' processor of a model's images."""
    fields = settings.to_dict()
    if geometry.needs_image_sizes:
        pinpoints = [[height, width] for width, height in geometry.grid_pinpoints]
        kind = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints, "do_pad": True}
        return fields | kind
    if geometry.aspect_ratio == "pad":
        return fields | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return fields


def _write_chat_templates(
    directory: Path, tokenizer: PreTrainedTokenizerFast, template_name: str, mm_use_im_start_end: bool
) -> list[str]:
    template = get_template(template_name)
    text = chat_template(template, mm_use_im_start_end=mm_use_im_start_end)
    (directory / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    notes = [f"chat template: {template.name}"]
    if template.stop != tokenizer.eos_token and template.style is not TemplateStyle.PLAIN:
        notes.append(
            f"an answer of template {template.name} ends with {template.stop!r}, which is not the tokenizer's end "
            f"token ({tokenizer.eos_token!r}): give it to a server as a stop string"
        )
    if template.style is TemplateStyle.PLAIN:
        notes.append("template plain is that of projector pretraining: no conversation")
        return notes
    separator = begin_separator(tokenizer, template.prompt([("human", "x")]))
    if separator is not None:
        text = chat_template(template, mm_use_im_start_end=mm_use_im_start_end, begin=separator)
        (directory / CHAT_TEMPLATE_WITH_BEGIN).write_text(text, encoding="utf-8")
    return notes
