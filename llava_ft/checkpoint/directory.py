"""What a directory holds, read from the files in it and never from its name.

A model in transformers' own layout of LLaVA is described by native fields, as any other: nothing behind this border
knows the difference.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llava_ft.checkpoint.fields import ModelFields, TowerFields
from llava_ft.checkpoint.names import (
    ADAPTER_ALL_BIN,
    ADAPTER_BIN,
    ADAPTER_CONFIG,
    ADAPTER_SAFETENSORS,
    CONFIG,
    NON_LORA_BIN,
    NON_LORA_SAFETENSORS,
    PROJECTOR_BIN,
    PROJECTOR_SAFETENSORS,
)
from llava_ft.checkpoint.weights import has_model_weights
from llava_ft.data.image_processor import pads_to_square
from llava_ft.errors import CheckpointError
from llava_ft.json_files import check_fields, read_json
from llava_ft.models.builder import is_llava_config
from llava_ft.models.families import known_families
from llava_ft.models.towers import find_tower

Kind = Literal["lora", "projector", "llava", "language model", "vision tower"]
Need = Literal["weights", "tokenizer", "config"]
"""What of a model has to be here: all of it; what prepares data, without weights; or nothing but `config.json`."""

Layout = Literal["native", "hf"]
"""How a model's files are named and its configuration is written: as LLaVA does it, or as transformers does."""


@dataclass(frozen=True)
class ModelDirectory:
    """A model on disk."""

    path: Path
    kind: Kind  # `lora` is an adapter with what was trained beside it, `projector` a projector alone
    config: dict[str, Any] = field(default_factory=dict[str, Any])  # in native fields; empty if there is none
    layout: Layout = "native"  # of `config.json`

    @property
    def adapter_file(self) -> Path | None:
        """The file with the LoRA weights, the one that PEFT takes; `adapter_model_all.bin` holds all and comes last."""
        return _first(self.path, ADAPTER_SAFETENSORS, ADAPTER_BIN, ADAPTER_ALL_BIN)

    @property
    def non_lora_file(self) -> Path | None:
        """The file with what was trained beside the LoRA weights."""
        return _first(self.path, NON_LORA_BIN, NON_LORA_SAFETENSORS)

    @property
    def projector_file(self) -> Path | None:
        """The file with a projector alone."""
        return _first(self.path, PROJECTOR_BIN, PROJECTOR_SAFETENSORS)


def identify(path: Path, need: Need = "weights") -> ModelDirectory:
    """Say what a directory holds.

    Raises:
        UserError: It does not exist, lacks what is needed, or holds nothing known or a model that is not supported.
    """
    if not path.is_dir():
        reason = "is a file" if path.is_file() else "does not exist"
        raise CheckpointError(f"{path} {reason}; the directory of a model is needed.")
    config, layout = read_config(path) if (path / CONFIG).is_file() else (dict[str, Any](), "native")
    if (path / ADAPTER_CONFIG).is_file():
        return ModelDirectory(path, "lora", config, layout)
    if not config and need == "tokenizer":
        return ModelDirectory(path, "language model", {"model_type": known_families()[0].model_type})
    if not config:
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{path} is not a model directory: it has neither {CONFIG} nor {ADAPTER_CONFIG}. It holds {names}."
        )
    if has_model_weights(path) or (need != "weights" and not _first(path, PROJECTOR_BIN, PROJECTOR_SAFETENSORS)):
        if "model_type" in config and find_tower(config) is not None:
            return ModelDirectory(path, "vision tower", config)
        return ModelDirectory(path, "llava" if is_llava_config(config) else "language model", config, layout)
    if _first(path, PROJECTOR_BIN, PROJECTOR_SAFETENSORS):
        return ModelDirectory(path, "projector", config, layout)
    raise CheckpointError(
        f"{path} has a {CONFIG} but no weights: neither a model's, nor an adapter's, nor a projector's. Is the copy "
        "or download complete?"
    )


def read_config(path: Path) -> tuple[dict[str, Any], Layout]:
    """Read `config.json` of a directory, for a LLaVA model in transformers' own layout as native fields.

    Raises:
        UserError: It is missing or damaged, or describes a model of that layout that is not supported.
    """
    file = path / CONFIG
    fields = read_json(file)
    if not {"text_config", "vision_config"} & fields.keys():
        is_tower = "model_type" in fields and find_tower(fields) is not None
        check_fields(fields, TowerFields if is_tower else ModelFields, str(file))
        return fields, "native"
    for part, schema in (("text_config", ModelFields), ("vision_config", TowerFields)):
        if not isinstance(fields.get(part, {}), dict):
            raise CheckpointError(f"{file}: {part} is no object. Get the file from its origin again.")
        check_fields(fields.get(part, {}), schema, f"{part} in {file}")
    from llava_ft.checkpoint.hf.config import is_hf_config, native_fields  # other models do without

    if not is_hf_config(fields):
        return fields, "native"
    native = native_fields(fields, str(path))
    if not str(native["image_aspect_ratio"]).startswith("anyres"):
        native["image_aspect_ratio"] = "pad" if pads_to_square(path) else "square"
    return native, "hf"


def find_model_directory(
    name: str, need: Need = "weights", *, cache_dir: str | None = None, relative_to: Path | None = None
) -> ModelDirectory:
    """Find a model given by path or by its name on the Hugging Face hub, and say what its directory holds.

    Of a model on the hub as much is fetched as is needed. If that is `config.json` and the model is one of `PUBLISHED`,
    nothing is, and the directory does not exist.

    Raises:
        UserError: It is nowhere, or not what is needed.
    """
    if need != "config" or _local(name, relative_to):
        return identify(resolve_model_path(name, cache_dir=cache_dir, relative_to=relative_to), need)
    _refuse_unlike_hub(name)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # pyright: ignore[reportUnknownVariableType]

    from llava_ft.models.families.published import PUBLISHED

    cached = try_to_load_from_cache(name, CONFIG, cache_dir=cache_dir)
    if not isinstance(cached, str) and name in PUBLISHED:
        fields = dict(PUBLISHED[name])
        return ModelDirectory(Path(name), "llava" if is_llava_config(fields) else "language model", fields)
    try:
        file = Path(cached if isinstance(cached, str) else hf_hub_download(name, CONFIG, cache_dir=cache_dir))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no directory here, and its {CONFIG} could not be fetched from the Hugging Face hub: "
            f"{str(error).splitlines()[0]}. Give a directory with {CONFIG} in it; weights are not needed to plan. "
            f"Known without any file are {', '.join(PUBLISHED)}."
        ) from None
    return identify(file.parent, need)


def base_of_adapter(path: Path) -> str:
    """Return the base that the `adapter_config.json` of a directory names; "" if it names none or is not there."""
    file = path / ADAPTER_CONFIG
    return str(read_json(file).get("base_model_name_or_path") or "") if file.is_file() else ""


def absolute_or_hub_name(name: str) -> str:
    """Return the name by which another directory or run finds something: an absolute path, or a name on the hub.

    A relative path would depend on where the program was started; the name of a model on the hub stays as it is.
    """
    return str(Path(name).resolve()) if Path(name).exists() else name


def resolve_model_path(name: str, *, cache_dir: str | None = None, relative_to: Path | None = None) -> Path:
    """Find the directory of a model given by path or by its name on the Hugging Face hub.

    A relative path may also start from `relative_to`.

    Raises:
        CheckpointError: There is no such directory and it cannot be downloaded.
    """
    if (local := _local(name, relative_to)) is not None:
        return local
    _refuse_unlike_hub(name)
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType] - tqdm has no types
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(
                name,
                cache_dir=cache_dir,
                ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "flax_*", "tf_*", "*.md"],
                tqdm_class=None,
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        hint = " (offline mode is on)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise CheckpointError(
            f"{name} is no directory here and could not be fetched from the Hugging Face hub{hint}: "
            f"{str(error).splitlines()[0]}. Give the path of a local copy."
        ) from None


def _local(name: str, relative_to: Path | None) -> Path | None:
    candidates = (Path(name), *([relative_to / name] if relative_to else []))
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def _refuse_unlike_hub(name: str) -> None:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"The model directory {name} does not exist.")


def _first(directory: Path, *names: str) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)
