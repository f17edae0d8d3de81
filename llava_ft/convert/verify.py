"""Comparing two models that ought to say the same: the proof at the end of every merge, import and export.

Both are asked the same fixed questions, one of text and one with a picture. Compared are the logits of every position,
of the question and of the first model's greedy answer to it, and then the greedy answer of each by itself.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from llava_ft.checkpoint.base_and_adapters import open_base_and_adapters
from llava_ft.checkpoint.directory import ModelDirectory, identify
from llava_ft.checkpoint.overrides import Force
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.convert.proof import ConversionReport
from llava_ft.errors import RunError
from llava_ft.geometry import ImageGeometry
from llava_ft.inference.load import LoadedModel, load_base_and_adapters, load_model
from llava_ft.models.config import LlavaLlamaConfig
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
    """A fixed input.

    Attributes:
        name: What it is called in a report: `text` or `image`.
        ids: Token ids, with one `IMAGE_TOKEN_INDEX` in the place of a picture, not expanded.
        image: The picture, in mode RGB, if there is one.
    """

    name: str
    ids: list[int]
    image: Image.Image | None = None


class Speaker(Protocol):
    """A model that can be asked, in whatever program and layout."""

    def logits(self, question: Question) -> torch.Tensor:
        """Return the logits of every position, `(T, V)` float32 on the CPU; a picture takes many positions."""
        ...

    def greedy(self, question: Question, num_tokens: int) -> list[int]:
        """Return the ids of the greedy answer, at most `num_tokens`, with the end token if the model ended it."""
        ...


def fixed_questions(config: LlavaLlamaConfig) -> list[Question]:
    """Return a question of text and, if the model sees, one with a picture: the same on every machine.

    The tokens are spread over the first half of the vocabulary, where no layout has special tokens beside the lowest;
    tokens that were added for LLaVA end the question of text.
    """
    num_ordinary = max(2, config.vocab_size // 2)
    words = [1 + (index * 7919) % (num_ordinary - 1) for index in range(24)]
    added = [config.vocab_size - 2, config.vocab_size - 1] if config.mm_use_im_start_end else []
    questions = [Question("text", words + added)]
    geometry = config.image_geometry
    if geometry is not None:
        side = geometry.input_size
        width, height = 3 * side // 2, side
        red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
        green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
        pixels_HWC = np.stack([red, green, (red + green) % 256], axis=-1).astype(np.uint8)  # noqa: N806
        questions.append(Question("image", [*words[:8], IMAGE_TOKEN_INDEX, *words[8:]], Image.fromarray(pixels_HWC)))
    return questions


class NativeSpeaker:
    """A model of this program."""

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded

    @torch.no_grad()
    def logits(self, question: Question) -> torch.Tensor:
        """Return the logits of every position, `(T, V)` float32 on the CPU."""
        return self._loaded.model(**self._inputs(question)).logits[0].float().cpu()

    def greedy(self, question: Question, num_tokens: int) -> list[int]:
        """Return the ids of the greedy answer."""
        answer = self._loaded.model.generate(
            **self._inputs(question),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            repetition_penalty=1.0,
            max_new_tokens=num_tokens,
            pad_token_id=self._loaded.tokenizer.pad_token_id,
        )
        return answer[0].tolist()

    def _inputs(self, question: Question) -> dict[str, torch.Tensor]:
        device = next(self._loaded.model.parameters()).device
        if question.image is None:
            return {"input_ids": torch.tensor([question.ids], device=device)}
        transform = self._loaded.image_transform
        geometry: ImageGeometry | None = self._loaded.model.config.image_geometry
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


class Recorded:
    """What a model said to some questions, kept when the model itself is no longer in memory.

    It answers these questions as the model did, and gives the logits of the question followed by the greedy answer.
    """

    def __init__(self, speaker: Speaker, questions: Sequence[Question], num_tokens: int = ANSWER_TOKENS):
        self._answers = {question.name: speaker.greedy(question, num_tokens) for question in questions}
        self._logits = {
            question.name: speaker.logits(_continued(question, self._answers[question.name])) for question in questions
        }

    def logits(self, question: Question) -> torch.Tensor:
        """Return the logits of the question's positions and of the answer's, `(T + A, V)`."""
        return self._logits[question.name]

    def greedy(self, question: Question, num_tokens: int = ANSWER_TOKENS) -> list[int]:
        """Return the recorded answer."""
        return self._answers[question.name][:num_tokens]


def fixed_logits(loaded: LoadedModel) -> list[torch.Tensor]:
    """Return a model's logits on the fixed questions, `(T, V)` each."""
    speaker = NativeSpeaker(loaded)
    return [speaker.logits(question) for question in fixed_questions(loaded.model.config)]


def prove(
    report: ConversionReport,
    expected: Speaker,
    got: Speaker,
    questions: Sequence[Question],
    relative_bound: float,
) -> None:
    """Compare what two models say, and put it into the report. Only tokens that both vocabularies have are compared.

    Args:
        report: Gets `logits` and `answers`.
        expected: The source, or what was `Recorded` of it.
        got: The result.
        questions: What both are asked.
        relative_bound: Largest allowed difference of logits as a share of the source's largest one. A greedy answer may
            part from the source's only where two tokens are closer to each other than that.

    Raises:
        RunError: They differ by more; the report says where.
    """
    if not isinstance(expected, Recorded):
        expected = Recorded(expected, questions)
    for question in questions:
        answer = expected.greedy(question)
        wanted, found = expected.logits(question), got.logits(_continued(question, answer))
        _compare(report, question, (wanted, found), relative_bound)
        _compare_answers(report, question, wanted, answer, got.greedy(question, ANSWER_TOKENS))


def _compare(
    report: ConversionReport, question: Question, logits: tuple[torch.Tensor, torch.Tensor], relative_bound: float
) -> None:
    wanted, found = logits
    if wanted.shape[0] != found.shape[0]:
        raise RunError(
            f"The two models take {wanted.shape[0]} and {found.shape[0]} positions for the fixed {question.name} "
            "input: they do not cut the picture into the same patches."
        )
    num_shared = min(wanted.shape[1], found.shape[1])
    scale = float(wanted[:, :num_shared].abs().max())
    difference = float((wanted[:, :num_shared] - found[:, :num_shared]).abs().max())
    bound = relative_bound * scale
    entry = {"input": question.name, "max_difference": difference, "scale": scale, "bound": bound}
    report.logits.append(entry)
    if not difference <= bound:  # NaN is beyond every bound
        raise RunError(
            f"The result is not what it was made from: on the fixed {question.name} input the largest difference of "
            f"logits is {difference:.3g}, where at most {bound:.3g} is allowed (largest logit {scale:.3g})."
        )


def _compare_answers(
    report: ConversionReport, question: Question, wanted: torch.Tensor, source: list[int], result: list[int]
) -> None:
    report.answers.append({"input": question.name, "source": source, "result": result, "equal": source == result})
    position = next((i for i, (a, b) in enumerate(zip(source, result, strict=False)) if a != b), None)
    if position is None:
        if len(source) == len(result):
            return
        raise RunError(f"The greedy answers to the fixed {question.name} input have other lengths: {source}, {result}.")
    row = wanted[wanted.shape[0] - len(source) - 1 + position]
    bound = report.logits[-1]["bound"]
    gap = float(row[source[position]] - row[result[position]])
    if gap > bound:
        raise RunError(
            f"The greedy answers to the fixed {question.name} input differ at token {position + 1}: "
            f"{source[position]} and {result[position]}, whose logits in the source are {gap:.3g} apart, where less "
            f"than {bound:.3g} would be no surprise."
        )


def _continued(question: Question, answer: Sequence[int]) -> Question:
    return Question(question.name, [*question.ids, *answer], question.image)


def compare_merged(
    merged: Path,
    trained: str | Sequence[tuple[float, ModelDirectory]],
    model_base: str | None,
    *,
    vision_tower: str | None = None,
    merged_dtype: torch.dtype = torch.float32,
    force: Force = False,
    quantization: Quantization | None = None,
    report: ConversionReport | None = None,
) -> ConversionReport:
    """Compare a merged model with the adapter beside its base, quantised if it was merged into such weights.

    The two models are in memory one after the other. Both are computed in float32, or in `merged_dtype` if float32
    weights would not fit into the memory that is free.

    Args:
        merged: The merged model.
        trained: What was merged: a directory, or several adapters and the weight of each.
        model_base: The base; when absent, the one that the adapters name.
        vision_tower: The vision tower, if it is not where the model says.
        merged_dtype: Type that the merged weights were rounded to; it decides the bound.
        force: What was passed over.
        quantization: How the base was quantised before it was merged into, if it was.
        report: Gets the result.

    Returns:
        The report given, or a new one, with `logits` and `answers` filled.

    Raises:
        RunError: They differ by more than rounding explains.
    """
    dtype = computing_dtype(merged, merged_dtype, free_memory())
    shares = [(1.0, identify(Path(trained)))] if isinstance(trained, str) else trained
    source = open_base_and_adapters(shares, model_base, vision_tower=vision_tower, force=force)
    loaded = load_base_and_adapters(source, dtype=dtype, device="cpu", adapter="beside", quantization=quantization)
    questions = fixed_questions(loaded.model.config)
    expected = Recorded(NativeSpeaker(loaded), questions)
    tower = vision_tower or loaded.model.config.mm_vision_tower
    del loaded
    got = NativeSpeaker(load_model(str(merged), vision_tower=tower, dtype=dtype, device="cpu"))
    relative = RELATIVE_BOUNDS.get(merged_dtype, 1e-4)
    if quantization is not None and quantization.bits == 8:
        relative = max(relative, BOUND_IN_8_BITS)
    report = report or ConversionReport(
        "merge", " and ".join(str(directory.path) for _, directory in shares), str(merged)
    )
    prove(report, expected, got, questions, relative)
    return report


def computing_dtype(merged: Path, merged_dtype: torch.dtype, free_bytes: int) -> torch.dtype:
    """Choose the dtype of a comparison: float32 if a model's weights take at most 80% of the free memory in it."""
    num_values = sum(info.num_bytes // info.dtype.itemsize for info in WeightFiles.open(merged).tensors.values())
    if torch.float32.itemsize * num_values <= 0.8 * free_bytes:
        return torch.float32
    logger.warning("The logits are compared in %s: the memory that is free is too small for float32.", merged_dtype)
    return merged_dtype


def free_memory() -> int:
    """Memory in bytes that a process can take without swapping; Linux's own estimate."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
