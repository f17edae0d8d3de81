"""Which attention kernel a run uses: what was asked for, or the fastest one that is installed and runs here.

The kernels themselves are in `models/attention/`, which also says what they need of the model.

Importing this module imports transformers and torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from llava_ft.errors import UserError

KERNELS: Final = ("flash_attention_3", "flash_attention_2", "varlen", "flex_attention", "sdpa", "eager")
"""Every kernel that may be named."""

_AUTO: Final = ("flash_attention_3", "flash_attention_2", "varlen", "sdpa")
"""What `auto` takes the first of: flex_attention is compiled first, and has no advantage for causal attention."""

_PACKAGES: Final[Mapping[str, tuple[str, str]]] = {
    "flash_attention_3": (
        "flash-attn-3",
        "Install flash-attn-3 from the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
    "flash_attention_2": ("flash-attn", "Install it with pip install flash-attn --no-build-isolation"),
    "varlen": ("torch.nn.attention.varlen", "Install torch 2.10 or newer"),
    "flex_attention": ("triton", "Install it with pip install triton"),
}
"""The package that a kernel needs, and how to come by it."""


@dataclass(frozen=True)
class AttentionMachine:
    """What decides whether a kernel runs."""

    has_gpu: bool  # whether the model is on a GPU
    is_half: bool  # whether products are computed in bf16 or fp16
    installed: frozenset[str]  # kernels whose packages are there
    capability: tuple[int, int] | None = None  # compute capability of the GPU; None if that is not known
    is_rocm: bool = False  # whether torch is built for AMD's GPUs


def this_machine(*, has_gpu: bool, is_half: bool) -> AttentionMachine:
    """Look at this machine, for a run that is on a GPU or not, and computes in bf16 or fp16 or not."""
    is_here = has_gpu and torch.cuda.is_available()
    return AttentionMachine(
        has_gpu=has_gpu,
        is_half=is_half,
        installed=installed_kernels(),
        capability=torch.cuda.get_device_capability() if is_here else None,
        is_rocm=torch.version.hip is not None,
    )


def installed_kernels() -> frozenset[str]:
    """Return the kernels whose packages are there. Nothing is looked for on a hub."""
    found = {
        "flash_attention_3": is_flash_attn_3_available(),
        "flash_attention_2": is_flash_attn_2_available(),
        "varlen": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "flex_attention": importlib.util.find_spec("triton") is not None,
        "sdpa": True,
        "eager": True,
    }
    return frozenset(name for name, is_there in found.items() if is_there)


def obstacle(kernel: str, machine: AttentionMachine) -> str | None:
    """Say why a kernel cannot run on a machine; None if it can."""
    if kernel in ("sdpa", "eager"):
        return None
    if not machine.has_gpu:
        return "it needs a GPU"
    if kernel != "flex_attention":
        if not machine.is_half:
            return "it needs bf16 or fp16"
        if machine.is_rocm and kernel != "flash_attention_2":
            return "it needs an NVIDIA GPU"
        generation = None if machine.capability is None or machine.is_rocm else machine.capability[0]
        if generation is not None and generation < 8:
            return f"it needs a GPU of compute capability 8.0 (Ampere) or newer, and this one has {_version(machine)}"
        if kernel == "flash_attention_3" and generation is not None and generation > 9:
            return f"it needs a GPU of compute capability 8.0 to 9.0, and this one has {_version(machine)}"
    if kernel not in machine.installed:
        return f"{_PACKAGES[kernel][0]} is not installed"
    return None


def choose_kernel(requested: str, machine: AttentionMachine, notes: list[str]) -> str:
    """Choose the attention kernel.

    Args:
        requested: "auto" or one of `KERNELS`.
        machine: Where it is to run.
        notes: Receives a sentence about what `auto` took, or what was replaced on a CPU.

    Returns:
        One of `KERNELS`.

    Raises:
        UserError: A kernel was named that does not run on the GPU.
    """
    if requested == "auto":
        chosen = next(kernel for kernel in _AUTO if obstacle(kernel, machine) is None)
        reasons = [f"not {kernel}, {obstacle(kernel, machine)}" for kernel in _AUTO[: _AUTO.index(chosen)]]
        why = "; ".join(reasons) if machine.has_gpu else "there is no GPU"
        notes.append(f"attn_implementation=auto takes {chosen}" + (f": {why}." if why else "."))
        return chosen
    reason = obstacle(requested, machine)
    if reason is None:
        return requested
    if not machine.has_gpu:
        notes.append(f"attn_implementation={requested} is replaced by sdpa: {reason}.")
        return "sdpa"
    possible = ", ".join(kernel for kernel in KERNELS if obstacle(kernel, machine) is None)
    install = f"{_PACKAGES[requested][1]}, or use" if reason.endswith("is not installed") else "Use"
    raise UserError(
        f"attn_implementation={requested} cannot be used: {reason}. What runs here: {possible}. {install} auto, which "
        f"takes {choose_kernel('auto', machine, [])}."
    )


def _version(machine: AttentionMachine) -> str:
    assert machine.capability is not None
    return ".".join(map(str, machine.capability))
