"""An exported GGUF model as one of this program's, to compare what it says with what its source says."""

from dataclasses import replace
from pathlib import Path

import torch

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.convert.gguf_file import GgufContent
from llava_ft.convert.gguf_read import find_files, read_model
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.data.images import ImageTransform
from llava_ft.inference.load import DEFAULT_TEMPLATE, LoadedModel


def load_gguf(directory: Path, whole: FullModel, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load what an export wrote: weights, configuration and image normalisation from the GGUF files alone.

    Args:
        directory: Where the files are.
        whole: The model that was exported; its tokenizer and its images' size are taken.
        dtype: Type of the weights in memory.

    Raises:
        CheckpointError: The directory does not hold one exported model.
    """
    model = read_model(directory, dtype)
    vision_file = find_files(directory)[1]
    transform = None
    if vision_file is not None:
        assert whole.base.vision_directory is not None
        keys = GgufContent(vision_file).fields
        settings = replace(
            ImageProcessorSettings.from_pretrained(whole.base.vision_directory),
            image_mean=tuple(keys["clip.vision.image_mean"]),
            image_std=tuple(keys["clip.vision.image_std"]),
        )
        transform = ImageTransform(settings, geometry=model.config.image_geometry)
    return LoadedModel(
        tokenizer=whole.tokenizer,
        model=model,
        image_transform=transform,
        template=whole.config.conversation_template or DEFAULT_TEMPLATE,
        context_len=model.config.max_position_embeddings,
        base=whole.base,
    )
