"""What the benchmark of a training step trains on: model shapes, and samples with lengths like LLaVA's mixture.

Weights are random and made in place. Lengths are those of llava_v1_5_mix665k in outline: 6% of the samples are text
alone, an image takes 576 tokens, and text is log-normal, 223 tokens on average, so that a sample has about 760 tokens
(cut off at `max_length`). They are those of no real file. Half of the text behind the system prompt is answers, which
are supervised.
"""

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.data.sampler import modality_order
from llava_ft.models.families.published import PUBLISHED

SYSTEM_TOKENS, TURN_TOKENS, MEAN_TEXT = 35, 60, 223
TEXT_ONLY = 0.06


def published(name: str) -> dict[str, Any]:
    """Sizes of a published model, as `llava-ft plan` knows them."""
    return {key: value for key, value in PUBLISHED[name].items() if key not in ("model_type", "tie_word_embeddings")}


CLIP_L = published("openai/clip-vit-large-patch14-336")
LLAMA_7B = published("lmsys/vicuna-7b-v1.5") | {"bos_token_id": 1}
LLAMA_13B = published("lmsys/vicuna-13b-v1.5") | {"bos_token_id": 1}


@dataclass(frozen=True)
class Preset:
    """A model and how it is trained.

    Attributes:
        name: Name of the preset.
        language: Fields of the language model's configuration.
        vision: Fields of CLIP's configuration.
        device: Where it is meant to run.
        dtype: Compute dtype, and dtype of frozen weights.
        batch_size: Samples of a step.
        lora_r: Rank of the adapters; 0 trains the language model itself.
        lora_alpha: Their scale times the rank.
        max_length: Longest sample in tokens.
        num_steps: Steps that are timed.
        bits: 4 for QLoRA.
        recomputed: `gradient_checkpointing` of all ways to train: `none`, `full` or `selective`.
        mean_text: Tokens of a sample's text, on average.
        compiler: Backend of `torch.compile`.
    """

    name: str
    language: dict[str, Any]
    vision: dict[str, Any]
    device: str
    dtype: torch.dtype
    batch_size: int
    lora_r: int = 128
    lora_alpha: int = 256
    max_length: int = 2048
    num_steps: int = 16
    bits: int = 16
    recomputed: str = "none"
    mean_text: int = MEAN_TEXT
    compiler: str = "inductor"

    @property
    def flags(self) -> dict[str, str]:
        """The flags of `llava-ft train` that say the same; the paths stand for none."""
        flags = {
            "model_name_or_path": self.name,
            "data_path": self.name,
            "output_dir": self.name,
            "version": "v1",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": "-2",
            "image_aspect_ratio": "pad",
            "model_max_length": str(self.max_length),
            "per_device_train_batch_size": str(self.batch_size),
            "learning_rate": "2e-4",
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": self.recomputed,
        }
        if self.lora_r:
            flags |= {"lora_enable": "True", "lora_r": str(self.lora_r), "lora_alpha": str(self.lora_alpha)}
            flags |= {"lora_dropout": "0", "bits": str(self.bits)}
        if self.dtype == torch.bfloat16:
            flags["bf16"] = "True"
        if self.device == "cpu":
            flags["use_cpu"] = "True"
        return flags

    def shrunk(self) -> "Preset":
        """The same with the smallest model that has all its parts, on a CPU: to see that everything runs."""
        return replace(
            self,
            language=TINY_LLAMA,
            vision=TINY_CLIP,
            device="cpu",
            batch_size=2,
            lora_r=min(self.lora_r, 4),
            lora_alpha=8,
            max_length=128,
            num_steps=2,
            mean_text=60,
            compiler="aot_eager",
        )


def _small_llama(width: int, inner: int, layers: int, heads: int, words: int = 32000) -> dict[str, Any]:
    return LLAMA_7B | {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": words,
    }


TINY_LLAMA = _small_llama(64, 128, 2, 4, 320)
TINY_CLIP = CLIP_L | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
}
_CPU_SMALL = Preset(
    "cpu_small",
    _small_llama(512, 1408, 8, 8),
    CLIP_L | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 4},
    device="cpu",
    dtype=torch.float32,
    batch_size=2,
    lora_r=16,
    lora_alpha=32,
)
_H200_7B = Preset("h200_7b", LLAMA_7B, CLIP_L, "cuda", torch.bfloat16, batch_size=8)
PRESETS = {
    preset.name: preset
    for preset in (
        _CPU_SMALL,
        replace(_CPU_SMALL, name="cpu_small_r128", lora_r=128, lora_alpha=256),
        _H200_7B,
        replace(_H200_7B, name="h200_13b", language=LLAMA_13B, batch_size=4),
        replace(_H200_7B, name="h200_7b_full", lora_r=0, batch_size=8, recomputed="full"),
        replace(_H200_7B, name="qlora_24gb", batch_size=2, bits=4, recomputed="full"),
    )
}


def find_preset(name: str, *, dry_run: bool = False) -> Preset:
    """A preset by its name; with `dry_run` the smallest model in its place, on a CPU."""
    preset = PRESETS[name]
    return preset.shrunk() if dry_run else preset


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
    median = (
        math.log(preset.mean_text - SYSTEM_TOKENS) - 0.5
    )  # the mean of a log-normal of spread 1 is exp(0.5) medians
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
