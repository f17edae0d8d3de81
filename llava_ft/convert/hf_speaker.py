"""A model in transformers' own layout, asked the questions that conversions are proven with."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights  # pyright: ignore[reportMissingTypeStubs]
from peft import PeftModel
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.hf.config import hf_fields
from llava_ft.checkpoint.hf.names import module_name
from llava_ft.checkpoint.load import fit_rows
from llava_ft.checkpoint.names import CONFIG, EMBEDDINGS, HEAD
from llava_ft.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.convert.export_hf import write_hf_files
from llava_ft.convert.hf_tokenizer import image_token_id
from llava_ft.convert.verify import Question, Speaker
from llava_ft.errors import RunError
from llava_ft.json_files import read_json
from llava_ft.models.config import LlavaModelConfig

MODEL_CLASSES: Any = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}


def build_hf_skeleton(config: LlavaModelConfig, dtype: Any) -> Any:
    """Build transformers' own model for a configuration, with its parameters on the meta device.

    `dtype` is what the model's configuration says.
    """
    fields = hf_fields(config, image_token_id=config.vocab_size - 1, dtype=dtype)
    model_class = MODEL_CLASSES[fields["model_type"]]
    with init_empty_weights(include_buffers=False):
        return model_class(model_class.config_class.from_dict(fields))


class HfSpeaker(Speaker):
    """A model of transformers with its own processor; nothing of this program prepares its input but the token ids."""

    repeats_question = True

    def __init__(self, model: Any, processor: Any):
        super().__init__(model.eval())
        self._processor = processor
        self._image_token_id: int = model.config.image_token_index

    @classmethod
    def load(cls, directory: Path, dtype: torch.dtype) -> "HfSpeaker":
        """Load a directory as any user of transformers would.

        Raises:
            RunError: The library finds keys missing, unexpected or of another shape.
        """
        model_class = MODEL_CLASSES[read_json(directory / CONFIG)["model_type"]]
        model, info = model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True)
        wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys and kind != "error_msgs"}
        if wrong:
            raise RunError(f"transformers does not take the exported weights as they are: {wrong}.")
        return cls(model, cast("Any", AutoProcessor).from_pretrained(directory))

    @classmethod
    def with_adapter(cls, whole: FullModel, adapter: Path, dtype: torch.dtype) -> "HfSpeaker":
        """Put an exported adapter on its base, which is made in memory as its own export would write it.

        A projector that was trained beside the adapter is zero in the base, so that the adapter has to bring it.
        """
        alone = FullModel(replace(whole.base, adapters=(), rows={}))
        config = copy.deepcopy(whole.config)
        config.vocab_size = max(config.vocab_size, image_token_id(whole.tokenizer) + 1)
        model = build_hf_skeleton(config, dtype)
        state: dict[str, torch.Tensor] = {}
        for piece in alone.stream(dtype, with_tower=True):
            is_trained = alone.origin(piece.name) == "replaced"
            value = torch.zeros_like(piece.value) if is_trained else piece.value
            if piece.name in (EMBEDDINGS, HEAD):
                value = fit_rows(value, (config.vocab_size, *value.shape[1:]))
            state[module_name(piece.name)] = value
        model.load_state_dict(state, strict=not config.tie_word_embeddings, assign=True)
        model.tie_weights()
        with tempfile.TemporaryDirectory() as folder:
            write_hf_files(whole, Path(folder))
            processor = cast("Any", AutoProcessor).from_pretrained(folder)
        model.config.image_token_index = image_token_id(whole.tokenizer)
        return cls(cast("Any", PeftModel).from_pretrained(model, str(adapter)), processor)

    def inputs(self, question: Question) -> dict[str, torch.Tensor]:
        """Return what the model takes."""
        ids = question.ids
        inputs: dict[str, torch.Tensor] = {}
        if question.image is not None:
            prepared = self._processor(images=question.image, text=IMAGE_TOKEN, return_tensors="pt")
            num_tokens = int((prepared["input_ids"] == self._image_token_id).sum())
            position = ids.index(IMAGE_TOKEN_INDEX)
            ids = [*ids[:position], *[self._image_token_id] * num_tokens, *ids[position + 1 :]]
            inputs = {key: prepared[key] for key in ("pixel_values", "image_sizes") if key in prepared}
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        input_ids = torch.tensor([ids])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **inputs}
