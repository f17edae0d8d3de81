"""Comparing two models that ought to say the same: the proof at the end of every merge, import and export.

Both are asked the same fixed questions, one of text and one with a picture. Compared are the logits of every position,
of the question and of the first model's greedy answer to it, and then the greedy answer of each by itself.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.constants import IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.convert.proof import ConversionReport
from llava_ft.errors import RunError
from llava_ft.geometry import ImageGeometry
from llava_ft.inference.load import LoadedModel
from llava_ft.tuning.quant import Quantization

logger = logging.getLogger(__name__)

RELATIVE_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest allowed difference of logits, as a share of the largest logit, by the dtype the merged weights are rounded
to. float16 rounds a weight by 2^-11 of its size and bfloat16 by 2^-8; a sum over layers of such errors stays well below
these bounds, and any forgotten or doubled tensor is far above them."""

BOUND_IN_8_BITS = 6e-2
"""The same for comparison with weights in 8 bits, which round the inputs of each layer to 8 bits as well."""

ANSWER_TOKENS = 16
"""Length of a greedy answer that is compared, in tokens, if the model does not end it earlier."""


@dataclass(frozen=True)
class Question:
    """A fixed input."""

    name: str  # in a report: `text` or `image`
    ids: list[int]  # tokens, with one `IMAGE_TOKEN_INDEX` in the place of a picture, not expanded
    image: Image.Image | None = None  # in mode RGB

    def followed_by(self, answer: Sequence[int]) -> "Question":
        """Return the question with an answer behind it."""
        return replace(self, ids=[*self.ids, *answer])


class Speaker(ABC):
    """A model that can be asked, in whatever program and layout."""

    repeats_question = False
    """Whether the model's `generate` returns the question in front of the answer."""

    def __init__(self, model: Any, **settings: Any):
        self.model = model
        self._settings = settings  # of `generate`

    @abstractmethod
    def inputs(self, question: Question) -> dict[str, torch.Tensor]:
        """Return what the model takes."""

    @torch.no_grad()
    def logits(self, question: Question) -> torch.Tensor:
        """Return the logits of every position, `(T, V)` float32 on the CPU; a picture takes many positions."""
        return self.model(**self.inputs(question)).logits[0].float().cpu()

    @torch.no_grad()
    def greedy(self, question: Question) -> list[int]:
        """Return the ids of the greedy answer, with the end token if the model ended it."""
        inputs = self.inputs(question)
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "repetition_penalty": 1.0}
        answer = self.model.generate(**inputs, **greedy, max_new_tokens=ANSWER_TOKENS, **self._settings)
        return answer[0, inputs["input_ids"].shape[1] if self.repeats_question else 0 :].tolist()


def fixed_questions(loaded: LoadedModel) -> list[Question]:
    """Return a question of text and, if the model sees, one with a picture: the same on every machine.

    The tokens are spread over the first half of the vocabulary, where no layout has special tokens beside the lowest;
    tokens that were added for LLaVA end the question of text.
    """
    config = loaded.model.config
    num_ordinary = max(2, config.vocab_size // 2)
    words = [1 + (index * 7919) % (num_ordinary - 1) for index in range(24)]
    vocabulary = loaded.tokenizer.get_vocab()
    added = [IM_START_TOKEN, IM_END_TOKEN] if config.mm_use_im_start_end else []
    questions = [Question("text", words + [vocabulary[token] for token in added if token in vocabulary])]
    geometry = config.image_geometry
    if geometry is not None:
        side = geometry.input_size
        width, height = 3 * side // 2, side
        red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
        green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
        pixels_HWC = np.stack([red, green, (red + green) % 256], axis=-1).astype(np.uint8)  # noqa: N806
        questions.append(Question("image", [*words[:8], IMAGE_TOKEN_INDEX, *words[8:]], Image.fromarray(pixels_HWC)))
    return questions


class NativeSpeaker(Speaker):
    """A model of this program."""

    def __init__(self, loaded: LoadedModel):
        super().__init__(loaded.model, pad_token_id=loaded.tokenizer.pad_token_id)
        self._image_transform = loaded.image_transform

    def inputs(self, question: Question) -> dict[str, torch.Tensor]:
        """Return what the model takes."""
        device = next(self.model.parameters()).device
        if question.image is None:
            return {"input_ids": torch.tensor([question.ids], device=device)}
        transform = self._image_transform
        geometry: ImageGeometry | None = self.model.config.image_geometry
        assert transform is not None
        assert geometry is not None
        position = question.ids.index(IMAGE_TOKEN_INDEX)
        num_tokens = geometry.num_tokens(question.image.size)
        ids = [*question.ids[:position], *[IMAGE_TOKEN_INDEX] * num_tokens, *question.ids[position + 1 :]]
        return {
            "input_ids": torch.tensor([ids], device=device),
            "pixel_values": transform.normalizer(transform.pixels(question.image).to(device)),
            "image_sizes": torch.tensor([question.image.size]),
        }


class Record(NamedTuple):
    """What a model said, kept when the model itself is no longer in memory."""

    question: Question
    answer: list[int]
    logits: torch.Tensor  # of the question followed by the answer, `(T + A, V)`


def record(speaker: Speaker, questions: Sequence[Question]) -> list[Record]:
    """Ask a model."""
    answers = [speaker.greedy(question) for question in questions]
    return [
        Record(question, answer, speaker.logits(question.followed_by(answer)))
        for question, answer in zip(questions, answers, strict=True)
    ]


def prove_answers(
    report: ConversionReport,
    load_source: Callable[[], LoadedModel],
    load_result: Callable[[], Speaker],
    bound: float,
) -> None:
    """Compare what a source and its result say, as `prove`; the two are in memory one after the other."""
    source = load_source()
    expected = record(NativeSpeaker(source), fixed_questions(source))
    del source
    prove(report, expected, load_result(), bound)


def prove(report: ConversionReport, expected: Sequence[Record], got: Speaker, bound: float) -> None:
    """Compare what two models say, and put it into the report. Only tokens that both vocabularies have are compared.

    `bound` is the largest allowed difference of logits as a share of the source's largest one. A greedy answer may part
    from the source's only where two tokens are closer to each other than that.

    Raises:
        RunError: They differ by more; the report says where.
    """
    for question, answer, wanted in expected:
        input_name = f"the fixed {question.name} input"
        found = got.logits(question.followed_by(answer))
        if wanted.shape[0] != found.shape[0]:
            raise RunError(
                f"The two models take {wanted.shape[0]} and {found.shape[0]} positions for {input_name}: they do not "
                "cut the picture into the same patches."
            )
        num_shared = min(wanted.shape[1], found.shape[1])
        scale = float(wanted[:, :num_shared].abs().max())
        difference = float((wanted[:, :num_shared] - found[:, :num_shared]).abs().max())
        allowed = bound * scale
        report.logits.append({"input": question.name, "max_difference": difference, "scale": scale, "bound": allowed})
        if not difference <= allowed:  # NaN is beyond every bound
            raise RunError(
                f"The result is not what it was made from: on {input_name} the largest difference of logits is "
                f"{difference:.3g}, where at most {allowed:.3g} is allowed (largest logit {scale:.3g})."
            )
        result = got.greedy(question)
        report.answers.append({"input": question.name, "source": answer, "result": result, "equal": answer == result})
        parted = next((i for i, (a, b) in enumerate(zip(answer, result, strict=False)) if a != b), None)
        if parted is None and len(answer) != len(result):
            raise RunError(f"The greedy answers to {input_name} have other lengths: {answer}, {result}.")
        if parted is not None:
            row = wanted[wanted.shape[0] - len(answer) - 1 + parted]
            gap = float(row[answer[parted]] - row[result[parted]])
            if gap > allowed:
                raise RunError(
                    f"The greedy answers to {input_name} differ at token {parted + 1}: {answer[parted]} and "
                    f"{result[parted]}, whose logits in the source are {gap:.3g} apart, where less than {allowed:.3g} "
                    "would be no surprise."
                )


def relative_bound(*dtypes: torch.dtype, quantization: Quantization | None = None) -> float:
    """Return the largest difference of logits, as a share of the largest, that rounding to these types explains."""
    bounds = [RELATIVE_BOUNDS.get(dtype, RELATIVE_BOUNDS[torch.float32]) for dtype in dtypes]
    return max(*bounds, BOUND_IN_8_BITS if quantization is not None and quantization.bits == 8 else 0.0)


def computing_dtype(weights: Path, rounded_to: torch.dtype) -> torch.dtype:
    """Choose the type of a comparison: float32 if a model's weights take at most 80% of the free memory in it.

    Otherwise it is `rounded_to`, the type of the weights that are compared.
    """
    num_values = sum(info.num_bytes // info.dtype.itemsize for info in WeightFiles.open(weights).tensors.values())
    if torch.float32.itemsize * num_values <= 0.8 * psutil.virtual_memory().available:
        return torch.float32
    logger.warning("The logits are compared in %s: the memory that is free is too small for float32.", rounded_to)
    return rounded_to
