"""A model in transformers' own layout, asked the questions that conversions are proven with."""

import logging
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from llava_ft.checkpoint.names import CONFIG
from llava_ft.checkpoint.weights import read_json
from llava_ft.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.errors import RunError
from llava_ft.inference.verify import Question

logger = logging.getLogger(__name__)

MODEL_CLASSES: Any = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}


class Processor(Protocol):
    """The part of transformers' processors that is used here."""

    def __call__(self, *, images: object, text: str, return_tensors: str) -> Any:
        """Prepare a text and its images."""
        ...


class HfSpeaker:
    """A model of transformers with its own processor; nothing of this program prepares its input but the token ids.

    Args:
        model: The model.
        processor: What `AutoProcessor` gives for it.
    """

    def __init__(self, model: Any, processor: Processor):
        self.model = model.eval()
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

    @torch.no_grad()
    def logits(self, question: Question) -> torch.Tensor:
        """Return the logits of every position, `(T, V)` float32 on the CPU."""
        return self.model(**self._inputs(question)).logits[0].float().cpu()

    @torch.no_grad()
    def greedy(self, question: Question, num_tokens: int) -> list[int]:
        """Return the ids of the greedy answer, at most `num_tokens`."""
        inputs = self._inputs(question)
        answer = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            repetition_penalty=1.0,
            max_new_tokens=num_tokens,
        )
        return answer[0, inputs["input_ids"].shape[1] :].tolist()

    def _inputs(self, question: Question) -> dict[str, torch.Tensor]:
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
