"""Where a new run starts when it starts from an earlier one: `--init_from DIR --adapter_mode ...`.

| DIR | continue | new | merge_first |
| --- | --- | --- | --- |
| LoRA | adapter and what was trained beside it | what was trained beside it, without the adapter | both, merged |
| projector | the projector | the projector | - |
| whole model | the model, as with model_name_or_path | the same | - |

What is trained beside an adapter - projector, `image_newline`, rows of added tokens - is kept in every mode, whether
the new run trains it or not: the adapter's base alone is not what the earlier run was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llava_ft.checkpoint.adapter import replacements, rows_of_added_tokens
from llava_ft.checkpoint.directory import ModelDirectory, base_of_adapter, identify, resolve_model_path
from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.manifest import read_manifest
from llava_ft.checkpoint.model import ModelSpec
from llava_ft.checkpoint.names import IMAGE_NEWLINE
from llava_ft.checkpoint.overrides import Force
from llava_ft.checkpoint.restore import check_adapter_settings, trained_files
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import CheckpointError
from llava_ft.models.builder import checkpoint_wishes

AdapterMode = Literal["continue", "new", "merge_first"]


@dataclass(frozen=True)
class Start:
    """An earlier result that a run starts from."""

    directory: ModelDirectory
    mode: AdapterMode  # what becomes of an adapter in it
    flag: str = "init_from"  # the flag that named it, for messages

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.directory.path

    @property
    def has_adapter(self) -> bool:
        """Whether it holds a LoRA adapter."""
        return self.directory.kind == "lora"

    @property
    def is_whole(self) -> bool:
        """Whether it holds a whole model, which then is the base itself."""
        return self.directory.kind in ("llava", "language model")

    @property
    def vision_tower(self) -> str | None:
        """The vision tower that it was trained with, where its base need not name it."""
        return None if self.is_whole else self.directory.config.get("mm_vision_tower")

    @property
    def projector_file(self) -> str | None:
        """The file of a projector run."""
        return str(self.directory.projector_file) if self.directory.kind == "projector" else None

    def wishes(self) -> dict[str, Any]:
        """Configuration fields that it asks of the model; see `settle_config`."""
        return {} if self.is_whole else checkpoint_wishes(self.directory.config)

    def base_name(self, given: str) -> str:
        """Return the base of the run; `given` is `model_name_or_path`, "" if the user left it out.

        Raises:
            CheckpointError: Nothing names a base, or two different ones are named.
        """
        if self.is_whole:
            if given and Path(given).resolve() != self.path.resolve():
                raise CheckpointError(
                    f"{self.flag}={self.path} holds a whole model, and model_name_or_path={given} names another. Give "
                    "one of the two."
                )
            return str(self.path)
        named = given or (base_of_adapter(self.path) if self.has_adapter else "")
        if not named and (manifest := read_manifest(self.path)) is not None:
            named = manifest.base
        if not named:
            raise CheckpointError(
                f"{self.path} does not name the model it was trained on. Give it with --model_name_or_path."
            )
        if not given and Path(named).is_absolute() and not Path(named).is_dir():
            raise CheckpointError(
                f"{self.path} was trained on {named}, which does not exist here. Give its place with "
                "--model_name_or_path."
            )
        return named

    def check_adapter(self, settings: Mapping[str, Any], *, force: Force = False) -> None:
        """Check, where the adapter is trained on, that it has the settings of the run; see `check_adapter_settings`."""
        if self.has_adapter and self.mode == "continue":
            check_adapter_settings(self.directory, settings, force=force)

    def sources(self, *, force: Force = False) -> list[WeightSource]:
        """Return what was trained beside an adapter, as weights that win over the base's; see `trained_files`.

        Raises:
            CheckpointError: A file is missing, damaged or of another run.
        """
        files = trained_files(self.directory, force=force) if self.has_adapter else []
        return [
            WeightSource("start (beside the adapter)", of_file, names, must_fit=True)
            for of_file, names in zip(files, replacements(files), strict=True)
            if names
        ]

    def token_rows(self) -> dict[str, torch.Tensor]:
        """Return the rows of added tokens trained beside an adapter, by the matrix whose last rows they are."""
        file = self.directory.non_lora_file if self.has_adapter else None
        return rows_of_added_tokens([] if file is None else [WeightFiles.open(file)])

    def check_newline(self, base: ModelSpec) -> None:
        """Refuse a start whose `image_newline` is nowhere: a random one would take its place.

        Raises:
            CheckpointError: It is not in the files.
        """
        if base.newline_is_new and "unpad" in (self.directory.config.get("mm_patch_merge_type") or ""):
            raise CheckpointError(
                f"{self.path} was trained with mm_patch_merge_type={base.config.mm_patch_merge_type}, which needs "
                f"{IMAGE_NEWLINE}, but neither its files nor {base.directory.path} hold it. Use the directory of a run "
                "that saved it; original LLaVA leaves it out of mm_projector.bin."
            )


def find_start(
    path: str, mode: AdapterMode | None, *, trains_adapter: bool, flag: str = "init_from", cache_dir: str | None = None
) -> Start:
    """Find what a run starts from, reading small files alone.

    Args:
        path: A LoRA directory, a projector directory or a whole model; or a name on the Hugging Face hub.
        mode: What becomes of an adapter in it; `continue` when absent.
        trains_adapter: Whether the run trains LoRA.
        flag: The flag that named it.
        cache_dir: Where downloads are kept.

    Raises:
        CheckpointError: There is nothing to start from, or not in this mode.
    """
    try:
        directory = identify(resolve_model_path(path, cache_dir=cache_dir))
    except CheckpointError as error:
        raise CheckpointError(f"{flag}={path} cannot be started from. {error}") from None
    kind = directory.kind
    if flag == "lora_weight_path" and kind != "lora":
        raise CheckpointError(
            f"lora_weight_path {path} holds a {kind}, not a LoRA adapter. Use --init_from, which takes it."
        )
    if kind == "vision tower":
        raise CheckpointError(f"{flag}={path} holds a vision tower alone. Give it with --vision_tower.")
    if mode == "merge_first" and kind != "lora":
        raise CheckpointError(
            f"adapter_mode=merge_first: {path} holds a {kind} and no adapter, so there is nothing to merge. Leave "
            "adapter_mode out."
        )
    if kind == "lora" and (mode or "continue") == "continue" and not trains_adapter:
        raise CheckpointError(
            f"{flag}={path} holds a LoRA adapter, and this run trains none. Add lora_enable to train on it, or say "
            "with adapter_mode what becomes of it: merge_first trains the model it is merged into, new leaves it out."
        )
    return Start(directory, mode or "continue", flag)
