"""What is compared in the benchmark of a step: two baselines, and the program with one switch after another on."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workload import Preset

ORIGINAL, TRANSFORMERS, PLAIN = "original", "transformers", "plain"
MAIN = "fast_lora"
"""The way that further ones differ from in one switch."""


@dataclass(frozen=True)
class Variant:
    """One way to compute the same steps.

    Attributes:
        name: For the command line.
        label: For the table.
        program: `llava_ft`, `original` or `transformers`.
        flags: Flags of `llava-ft train` beside the preset's.
        all_logits: Compute float32 logits at every position, which the program never does.
        whole_last_layer: Compute the last layer everywhere, which the program never does.
        cached: Read features of the tower instead of images, as with `--vision_cache`.
    """

    name: str
    label: str
    program: str = "llava_ft"
    flags: Mapping[str, str] = field(default_factory=dict)
    all_logits: bool = False
    whole_last_layer: bool = False
    cached: bool = False


def all_variants(preset: Preset) -> list[Variant]:
    """The baselines, then the program with one switch after another on, then with another one instead."""
    adapters = " PEFT's LoRA" if preset.lora_r else " all of it trained"
    chain = _chain(Variant(PLAIN, f"padded, all logits,{adapters}", all_logits=True, whole_last_layer=True), preset)
    found = [
        Variant(ORIGINAL, "(a) computation of the original", ORIGINAL),
        Variant(TRANSFORMERS, "(b) transformers' LLaVA, Trainer, PEFT", TRANSFORMERS),
        *chain,
    ]
    main = next(variant for variant in reversed(chain) if not variant.cached)
    return [*found, *_variations(main, preset)]


def _chain(plain: Variant, preset: Preset) -> list[Variant]:
    current = replace(plain, flags={"attn_implementation": "sdpa", "fast_lora": "False"})
    found = [current]

    def add(name: str, label: str, flags: Mapping[str, str] | None = None, **changes: bool) -> None:
        nonlocal current
        current = replace(current, name=name, label=label, flags={**current.flags, **(flags or {})}, **changes)
        found.append(current)

    add("loss", "+ loss at supervised positions, in chunks", all_logits=False)
    add("last_layer", "+ last layer where it is read", whole_last_layer=False)
    joined = {"padding_free": "True", "attn_implementation": "auto"}
    add("joined", "+ no padding, attention within samples", joined)
    if preset.lora_r:
        add(MAIN, "+ own LoRA arithmetic", {"fast_lora": "True"})
    add("cached", "+ cached image features", cached=True)
    return found


def _variations(main: Variant, preset: Preset) -> Iterator[Variant]:
    """The program with all switches but the cache on, and one thing changed."""
    is_gpu = preset.device == "cuda"
    recomputed = {
        "none": ("nothing recomputed", {"gradient_checkpointing": "none"}),
        "selective": ("selective recomputation", {"gradient_checkpointing": "selective"}),
        "full": ("all layers recomputed", {"gradient_checkpointing": "full"}),
    }
    if is_gpu:
        every = {"gradient_checkpointing": "full", "gradient_checkpointing_every": "2"}
        recomputed["every_2"] = ("every second layer recomputed", every)
        offloaded = {"gradient_checkpointing": "full", "activation_offload": "True"}
        recomputed["offloaded"] = ("all layers recomputed, their inputs in host memory", offloaded)
    changes = {name: change for name, change in recomputed.items() if name != preset.recomputed}
    compiled = {"torch_compile": "True", "torch_compile_backend": preset.compiler}
    changes = {"compiled": ("layers compiled", compiled)} | changes
    if is_gpu:
        kernels = ("flash_attention_3", "flash_attention_2", "varlen", "flex_attention", "sdpa")
        changes |= {kernel: (f"attention: {kernel}", {"attn_implementation": kernel}) for kernel in kernels}
    for name, (label, flags) in changes.items():
        yield replace(main, name=name, label=f"without the cache, {label}", flags={**main.flags, **flags})
