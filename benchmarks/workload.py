"""What the benchmark of a training step trains on: model shapes, and samples with lengths like LLaVA's mixture.

Weights are random and made in place. Lengths are those of llava_v1_5_mix665k in outline: 6% of the samples are text
alone, an image takes 576 tokens, and text is log-normal, 223 tokens on average, so that a sample has about 760 tokens
(cut off at `max_length`). They are those of no real file. Half of the text behind the system prompt is answers, which
are supervised.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.data.sampler import modality_order

SYSTEM_TOKENS, TURN_TOKENS, MEAN_TEXT = 35, 60, 223
TEXT_ONLY = 0.06

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LLAMA = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1}
LLAMA_7B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_13B = LLAMA | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}


@dataclass(frozen=True)
class Preset:
    """A model and how it is trained.

    Attributes:
        name: Name of the preset.
        language: Fields of the language model's configuration.
        vision: Fields of CLIP's configuration.
        device: Where it is meant to run.
        dtype: Compute dtype, and dtype of frozen weights.
        lora_r: Rank of the adapters.
        lora_alpha: Their scale times the rank.
        batch_size: Samples of a step.
        max_length: Longest sample in tokens.
        num_steps: Steps that are timed.
        bits: 4 for QLoRA.
        gradient_checkpointing: Whether activations are recomputed.
    """

    name: str
    language: dict[str, Any]
    vision: dict[str, Any]
    device: str
    dtype: torch.dtype
    lora_r: int
    lora_alpha: int
    batch_size: int
    max_length: int = 2048
    num_steps: int = 16
    bits: int = 16
    gradient_checkpointing: bool = False


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "cpu_small",
            LLAMA
            | {
                "hidden_size": 512,
                "intermediate_size": 1408,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": 8,
            },
            CLIP_L
            | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 4},
            device="cpu",
            dtype=torch.float32,
            lora_r=16,
            lora_alpha=32,
            batch_size=2,
        ),
        Preset("h200_7b", LLAMA_7B, CLIP_L, "cuda", torch.bfloat16, 128, 256, batch_size=16),
        Preset("h200_13b", LLAMA_13B, CLIP_L, "cuda", torch.bfloat16, 128, 256, batch_size=8),
        Preset(
            "qlora_24gb", LLAMA_7B, CLIP_L, "cuda", torch.bfloat16, 128, 256, batch_size=2, bits=4,
            gradient_checkpointing=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        number: Its number; seeds the pixels.
        input_ids: `(T,)` int64, `IMAGE_TOKEN_INDEX` at each image token.
        labels: `(T,)` int64.
        has_image: Whether it has an image.
    """

    number: int
    input_ids: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)
    has_image: bool

    def pixel_values(self, side: int) -> torch.Tensor:
        """Random normalised pixels, `(1, 3, side, side)`."""
        return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(self.number))


def tokens_per_image(preset: Preset) -> int:
    """Tokens that an image takes."""
    return (preset.vision["image_size"] // preset.vision["patch_size"]) ** 2


def draw_samples(preset: Preset, num_samples: int, seed: int = 0) -> list[Sample]:
    """Draw samples; text alone are exactly 6% of them, rounded."""
    generator = torch.Generator().manual_seed(seed)
    text_only = set(torch.randperm(num_samples, generator=generator)[: round(TEXT_ONLY * num_samples)].tolist())
    median = math.log(MEAN_TEXT - SYSTEM_TOKENS) - 0.5  # the mean of a log-normal of spread 1 is exp(0.5) medians
    samples = []
    for number in range(num_samples):
        length = max(16, int(torch.empty(1).log_normal_(median, 1.0, generator=generator).item()))
        has_image = number not in text_only
        image = [IMAGE_TOKEN_INDEX] * tokens_per_image(preset) if has_image else []
        length = min(length, preset.max_length - SYSTEM_TOKENS - len(image))
        vocabulary = preset.language["vocab_size"]
        text = torch.randint(3, vocabulary, (SYSTEM_TOKENS + length,), generator=generator)
        is_answer = torch.arange(length) % TURN_TOKENS >= TURN_TOKENS // 2 if length > TURN_TOKENS else (
            torch.arange(length) >= length // 2
        )  # fmt: skip
        labels = torch.full_like(text, IGNORE_INDEX)
        labels[SYSTEM_TOKENS:][is_answer] = text[SYSTEM_TOKENS:][is_answer]
        head, tail = text[:SYSTEM_TOKENS], text[SYSTEM_TOKENS:]
        placed = torch.cat([head, torch.tensor(image, dtype=torch.int64), tail])
        unread = torch.full((SYSTEM_TOKENS + len(image),), IGNORE_INDEX)
        samples.append(Sample(number, placed, torch.cat([unread, labels[SYSTEM_TOKENS:]]), has_image))
    return samples


def make_batches(preset: Preset, num_steps: int, seed: int = 0) -> list[list[Sample]]:
    """Batches of an epoch, grouped by modality as the original's sampler does; the same for all variants."""
    samples = draw_samples(preset, num_steps * preset.batch_size, seed)
    signed = [len(sample.input_ids) * (1 if sample.has_image else -1) for sample in samples]
    order = modality_order(signed, preset.batch_size, 1, torch.Generator().manual_seed(seed))
    return [
        [samples[number] for number in order[start : start + preset.batch_size]]
        for start in range(0, len(order), preset.batch_size)
    ]
