"""A LoRA adapter as arithmetic: for each weight of the base model, what the adapter adds to it.

Source: LoRA (arXiv:2106.09685), equation 3, W + (alpha / r) B A; rsLoRA (arXiv:2312.03732) divides by sqrt(r).
Everything is computed in float32 and rounded once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_ft.checkpoint.directory import ModelDirectory
from llava_ft.checkpoint.names import ADAPTER_CONFIG
from llava_ft.checkpoint.overrides import Force
from llava_ft.checkpoint.restore import plain_name, trained_files
from llava_ft.checkpoint.weights import WeightFiles, read_json
from llava_ft.errors import CheckpointError

_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")


@dataclass(frozen=True)
class LoraAdapter:
    """The LoRA matrices of a directory.

    Attributes:
        path: The directory.
        factors: A `(r, in)` and B `(out, r)` for each weight they change, by its native name.
        scales: Factor of B A for each such weight.
        replaced: What was trained beside them, by native name: values that replace the base's.
    """

    path: Path
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scales: Mapping[str, float]
    replaced: WeightFiles

    @classmethod
    def read(cls, directory: ModelDirectory, *, force: Force = False) -> "LoraAdapter":
        """Read an adapter directory; `force` as for `trained_files`.

        Raises:
            CheckpointError: It is incomplete, damaged, or of a kind that cannot be merged.
        """
        config = read_json(directory.path / ADAPTER_CONFIG)
        _refuse_other_kinds(config, directory.path)
        adapter_files, beside = trained_files(directory, force=force)
        halves: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in adapter_files.read().items():
            match = _LORA_KEY.fullmatch(plain_name(key))
            if match is None:
                raise CheckpointError(f"{adapter_files.path} holds {key}, which is no LoRA matrix.")
            halves.setdefault(match["module"] + ".weight", {})[match["matrix"]] = tensor.float()
        lone = [name for name, matrices in halves.items() if len(matrices) != 2]
        if lone or not halves:
            raise CheckpointError(
                f"{adapter_files.path} is damaged: {len(lone)} of its modules have only one of the two LoRA matrices, "
                f"such as {lone[0]}."
                if lone
                else f"{adapter_files.path} holds no LoRA matrices."
            )
        factors = {name: (matrices["A"], matrices["B"]) for name, matrices in halves.items()}
        scales = {name: _scale(config, name, a.shape[0]) for name, (a, _) in factors.items()}
        return cls(directory.path, factors, scales, beside)

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a base weight with the adapter's part added, in float32; the weight itself if it has none.

        Raises:
            CheckpointError: The shapes do not fit.
        """
        if name not in self.factors:
            return weight
        a, b = self.factors[name]
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise CheckpointError(
                f"The adapter {self.path} changes {name} as a {b.shape[0]} x {a.shape[1]} matrix, but in the base "
                f"model it is {' x '.join(map(str, weight.shape))}. It belongs to another base model."
            )
        return weight.float() + self.scales[name] * (b @ a)


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha: float = config.get("lora_alpha", rank)
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name.removesuffix(".weight")):
            alpha = value
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _refuse_other_kinds(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type", "LORA")
        raise CheckpointError(f"{path} holds an adapter of the kind {kind}; only plain LoRA and rsLoRA are supported.")
