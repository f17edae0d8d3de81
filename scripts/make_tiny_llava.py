#!/usr/bin/env python3
"""Makes data/tiny-llava: a LLaVA of 1.5 million weights that describes small pictures which this script draws.

    python scripts/make_tiny_llava.py [--output data/tiny-llava]

Everything is made here from a seed: the pictures (coloured shapes, letters), the vocabulary and the weights. First the
vision tower learns to tell pictures apart, with classification heads that are thrown away; then tower, projector and
language model learn together to answer questions. No digit is drawn: that is left to the quick start.
"""

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from transformers import PreTrainedTokenizerBase

from llava_ft.checkpoint.save import config_fields, save_tensors, write_json
from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.conversation import get_template
from llava_ft.data.collator import PaddingCollator
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.data.records import Sample, Turn
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.data.tokenizer import load_tokenizer, save_tokenizer
from llava_ft.models.families.llama import LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava_ft.models.kernels.last_layer import read_last_layer_selectively

SIDE = 56
COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (240, 220, 50),
    "orange": (245, 145, 30), "purple": (150, 60, 190), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
NUMBERS = ("one", "two", "three", "four")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
KINDS = ("shape", "shapes", "letter")
VOCABULARY = 640
ROUNDS = ((450, 1.5e-3, 0.0), (500, 2e-3, 0.0), (110, 1.5e-3, 0.5))
"""Steps, learning rate and share of text without pictures of each round in which the whole model is trained.

Letters are learnt in the second one, the words for numbers in the last: LoRA cannot make a frozen head tell apart
words that it was never to say.
"""

README = """# A tiny LLaVA

Made by `python scripts/make_tiny_llava.py` (see there): a CLIP vision tower (56 pixels, 16 patches), an `mlp2x_gelu`
projector and a LLaMA, {millions:.1f} million weights in float16, with a vocabulary of their own. All of it was trained
from random weights, with a fixed seed, on pictures that the script draws: coloured shapes and letters. It answers
questions about these (`Which letter is this?`, `What colour is the shape?`, `How many shapes are there?`, `Describe the
picture.`) in the `v1` template and knows nothing else; digits in particular it has never seen.

No data and no weights of others are in it. Licence: that of this project.
"""


@dataclass
class Picture:
    """A drawn picture.

    Attributes:
        image: RGB, `SIDE` x `SIDE`.
        classes: What is in it, by the name of a head: an index each.
        talk: Questions and answers.
    """

    image: Image.Image
    classes: dict[str, int]
    talk: list[tuple[str, str]] = field(default_factory=list)


HEADS = {
    "kind": len(KINDS), "shape": len(SHAPES), "colour": len(COLOURS), "count": len(NUMBERS), "letter": len(LETTERS)
}  # fmt: skip


def article(word: str) -> str:
    """Put a or an in front."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, turn: float, fill) -> None:
    """Draw one shape with its middle at (x, y) and its farthest points `r` away."""

    def polygon(points: Sequence[tuple[float, float]]) -> None:
        cos, sin = math.cos(turn), math.sin(turn)
        canvas.polygon([(x + r * (a * cos - b * sin), y + r * (a * sin + b * cos)) for a, b in points], fill=fill)

    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, round(r * 0.35)))
    elif shape == "square":
        polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    elif shape == "triangle":
        polygon([(0, -1), (0.9, 0.7), (-0.9, 0.7)])
    elif shape == "diamond":
        polygon([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)])
    elif shape == "star":
        radii = [(1.0, 0.42)[i % 2] for i in range(10)]
        polygon([(s * math.sin(i * math.pi / 5), -s * math.cos(i * math.pi / 5)) for i, s in enumerate(radii)])
    elif shape == "cross":
        w = 0.3
        outline: list[tuple[float, float]] = []
        arm = [(-w, -w), (-w, -1), (w, -1)]
        for _ in range(4):
            outline = [*outline, *arm]
            arm = [(-b, a) for a, b in arm]
        polygon(outline)
    else:
        angles = np.arange(24) * math.pi / 12
        across = 16 * np.sin(angles) ** 3
        up = 13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)
        polygon(list(zip((across / 17).tolist(), (-up / 17).tolist(), strict=True)))


def draw_shapes(rng: random.Random, *, several: bool) -> Picture:
    """Draw one shape anywhere, or one to four of a kind beside each other."""
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    count = rng.randint(1, 4) if several else 1
    dark = rng.choice([(0, 0, 0), (25, 25, 35), (45, 45, 45)])
    scale = 2
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), dark)
    canvas = ImageDraw.Draw(image)
    places = [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]
    rng.shuffle(places)
    for place in places[:count]:
        r = rng.uniform(7, 11) if several else rng.uniform(12, 22)
        x, y = (SIDE * p + rng.uniform(-3, 3) for p in (place if several else (0.5, 0.5)))
        turn = rng.uniform(-0.25, 0.25)
        draw_shape(canvas, shape, x * scale, y * scale, r * scale, turn, COLOURS[colour])
    number, plural = NUMBERS[count - 1], "crosses" if shape == "cross" else shape + "s"
    phrase = f"one {colour} {shape}" if count == 1 else f"{number} {colour} {plural}"
    talk = [
        ("What colour is the shape?", f"The shape is {colour}."),
        ("Which shape is this?", f"This is {article(shape)}."),
        ("Describe the picture.", f"There is {article(colour)} {shape}."),
    ]
    if several:
        verb = "is" if count == 1 else "are"
        talk = [
            ("How many shapes are there?", f"There {verb} {number}."),
            ("What colour are the shapes?", f"The shapes are {colour}."),
            ("Describe the picture.", f"There {verb} {phrase}."),
        ]
    classes = {"shape": SHAPES.index(shape), "colour": list(COLOURS).index(colour), "count": count - 1}
    return Picture(image.resize((SIDE, SIDE), Image.Resampling.BOX), {"kind": int(several), **classes}, talk)


def draw_letter(rng: random.Random) -> Picture:
    """Draw a capital letter, turned and slanted a little, now and then as coarse as a small scan."""
    letter = rng.choice(LETTERS)
    colour = rng.choice(list(COLOURS)) if rng.random() < 0.4 else "white"
    mask = Image.new("L", (SIDE, SIDE), 0)
    canvas = ImageDraw.Draw(mask)
    font = ImageFont.load_default(rng.randint(34, 54))
    canvas.text(
        (SIDE / 2, SIDE / 2), letter, fill=255, font=font, anchor="mm", stroke_width=rng.choice([0, 0, 1, 1, 2])
    )
    turn, slant, sx, sy = rng.gauss(0, 0.13), rng.gauss(0, 0.15), rng.uniform(0.9, 1.5), rng.uniform(0.85, 1.25)
    a, b = sx * math.cos(turn), sx * (math.sin(turn) + slant)
    d, e = -sy * math.sin(turn), sy * math.cos(turn)
    half = SIDE / 2
    dx, dy = rng.uniform(-3, 3), rng.uniform(-3, 3)
    where = (a, b, half - a * half - b * half + dx, d, e, half - d * half - e * half + dy)
    mask = mask.transform((SIDE, SIDE), Image.Transform.AFFINE, where, Image.Resampling.BILINEAR)
    if rng.random() < 0.6:
        cells = rng.choice([8, 8, 10, 14])
        mask = mask.resize((cells, cells), Image.Resampling.BOX).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        top = max(1, int(np.asarray(mask).max()))
        mask = mask.point(lambda value: min(255, value * 255 // top))
    ground = rng.choice([(0, 0, 0), (0, 0, 0), (25, 25, 35)])
    full, empty = (Image.new("RGB", (SIDE, SIDE), paint) for paint in (COLOURS[colour], ground))
    image = Image.composite(full, empty, mask)
    talk = [
        ("Which letter is this?", f"This is the letter {letter}."),
        ("What colour is the letter?", f"The letter is {colour}."),
        ("Describe the picture.", f"There is {article(colour)} letter {letter}."),
    ]
    classes = {"kind": 2, "letter": LETTERS.index(letter), "colour": list(COLOURS).index(colour)}
    return Picture(image, classes, talk)


def draw(rng: random.Random) -> Picture:
    """Draw a picture of any kind; more than half are letters."""
    choice = rng.random()
    return draw_letter(rng) if choice < 0.6 else draw_shapes(rng, several=choice < 0.8)


def make_tokenizer(directory: Path, pictures: Sequence[Picture]) -> PreTrainedTokenizerBase:
    """Train a SentencePiece vocabulary of LLaMA's kind on what is said about pictures."""
    template = get_template("v1")
    digits = (*DIGITS, "ten")
    lines = [f"{question}\n{answer}" for picture in pictures for question, answer in picture.talk]
    lines += [template.prompt([("human", "Hello. Which digit is this?")])] * 200
    lines += [text for word in digits for text in (f"ASSISTANT: {word}", f"The number {word}.") for _ in range(60)]
    lines += [f"Letter {letter}, {letter.lower()}. {number}" for letter in LETTERS for number in range(10)]
    text = directory / "text"
    text.write_text("\n".join(line for entry in lines for line in entry.split("\n")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "tokenizer"), model_type="bpe", vocab_size=VOCABULARY,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        split_digits=True, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    (directory / "tokenizer.vocab").unlink()
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "pad_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": True,
            "model_max_length": 512, "clean_up_tokenization_spaces": False,
        },
    )  # fmt: skip
    return load_tokenizer(directory)


def make_config(vocabulary: int) -> LlavaLlamaConfig:
    """Describe the model."""
    vision = {
        "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_channels": 3, "image_size": SIDE, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "projection_dim": 96,
    }  # fmt: skip
    config = LlavaLlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False, mm_vision_tower="tiny-clip", mm_vision_config=vision,
        mm_hidden_size=96, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2,
        mm_vision_select_feature="patch", image_aspect_ratio="pad", conversation_template="v1",
        use_mm_proj=True, tokenizer_model_max_length=512, tokenizer_padding_side="right",
    )  # fmt: skip
    config.architectures = [LlavaLlamaForCausalLM.__name__]
    return config


def train(
    name: str, parameters: Sequence[nn.Parameter], steps: int, rate: float, loss_of: Callable[[int], torch.Tensor]
) -> None:
    """Take AdamW steps with a short warm-up and a cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    started, recent = time.monotonic(), 0.0
    for step in range(steps):
        factor = min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if (step + 1) % 25 == 0:
            print(f"{name}: step {step + 1}/{steps}, loss {recent:.3f}, {time.monotonic() - started:.0f} s", flush=True)


def train_tower(model: LlavaLlamaForCausalLM, pictures: Sequence[Picture], pixels: torch.Tensor, steps: int) -> None:
    """Teach the tower to tell pictures apart: from the class token of its last layer, and from its patches."""
    tower = model.model.vision_tower.vision_tower.vision_model
    width = tower.config.hidden_size
    heads = nn.ModuleDict({name: nn.Linear(2 * width, size) for name, size in HEADS.items()})
    targets = {name: torch.tensor([p.classes.get(name, -100) for p in pictures]) for name in HEADS}
    generator = torch.Generator().manual_seed(1)

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(len(pictures), (64,), generator=generator)
        output = tower(pixels[rows], output_hidden_states=True)
        features = torch.cat([output.pooler_output, output.hidden_states[-2][:, 1:].mean(1)], dim=-1)
        losses = [F.cross_entropy(heads[name](features), targets[name][rows], ignore_index=-100) for name in HEADS]
        return torch.stack(losses).sum()

    train("vision tower", [*tower.parameters(), *heads.parameters()], steps, 1.5e-3, loss_of)


def train_whole(
    model: LlavaLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pictures: Sequence[Picture],
    pixels: torch.Tensor,
    steps: int,
    rate: float,
    text_share: float,
) -> None:
    """Teach tower, projector and language model together to answer questions."""
    tokenize = SampleTokenizer(tokenizer, get_template("v1"))
    collate = PaddingCollator(tokenizer.pad_token_id)
    rng = random.Random(2)

    def text_item(row: int) -> dict:
        value = rng.randrange(10)
        question = rng.choice((f"Write {value} as a word.", f"What is the word for {value}?", f"Read {value}."))
        answer = rng.choice((f"This is the digit {DIGITS[value]}.", f"The digit is {DIGITS[value]}."))
        tokens = tokenize(Sample(row, "", (Turn("human", question), Turn("gpt", answer)), ()))
        return {"input_ids": torch.tensor(tokens.input_ids), "labels": torch.tensor(tokens.labels), "index": row}

    def item(row: int) -> dict:
        if text_share and rng.random() < text_share:
            return text_item(row)
        turns = []
        for number, (question, answer) in enumerate(rng.sample(pictures[row].talk, 2)):
            turns += [Turn("human", question if number else f"<image>\n{question}"), Turn("gpt", answer)]
        tokens = tokenize(Sample(row, "", tuple(turns), ("picture",)))
        ids, labels = torch.tensor(tokens.input_ids), torch.tensor(tokens.labels)
        repeats = torch.where(ids == IMAGE_TOKEN_INDEX, model.config.tokens_per_image, 1)
        ids, labels = ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels[row : row + 1], "index": row}

    def loss_of(step: int) -> torch.Tensor:
        batch = collate([item(rng.randrange(len(pictures))) for _ in range(32)])
        names = ("input_ids", "labels", "pixel_values")
        return model(**{name: batch[name] for name in names}).loss

    unused = ("encoder.layers.3", "post_layernorm")
    used = [p for name, p in model.named_parameters() if not any(part in name for part in unused)]
    train("whole model", used, steps, rate, loss_of)


def main() -> None:
    """Draw, train and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "data" / "tiny-llava")
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--tower-steps", type=int, default=800)
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    pictures = [draw(rng) for _ in range(options.pictures)]
    settings = ImageProcessorSettings(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    stacked = torch.from_numpy(np.stack([np.asarray(picture.image) for picture in pictures])).float() / 255
    mean, std = torch.tensor(settings.image_mean), torch.tensor(settings.image_std)
    pixels = ((stacked - mean) / std).permute(0, 3, 1, 2).contiguous()
    print(f"{len(pictures)} pictures drawn.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder), pictures)
    model = LlavaLlamaForCausalLM(make_config(len(tokenizer))).float().train()
    read_last_layer_selectively(model.model.layers)
    train_tower(model, pictures, pixels, options.tower_steps)
    for steps, rate, text_share in ROUNDS:
        train_whole(model, tokenizer, pictures, pixels, steps, rate, text_share)

    directory: Path = options.output
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, directory)
    weights = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
    save_tensors(weights, directory / "model.safetensors")
    write_json(directory / "config.json", config_fields(model.config, torch.float16))
    processor = {"image_processor_type": "CLIPImageProcessor", **settings.to_dict()}
    write_json(directory / "preprocessor_config.json", processor)
    count = sum(parameter.numel() for parameter in model.parameters())
    (directory / "README.md").write_text(README.format(millions=count / 1e6))
    print(f"Written to {directory}: {count} weights.")


if __name__ == "__main__":
    main()
