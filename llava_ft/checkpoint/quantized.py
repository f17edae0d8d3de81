"""What files say of quantised weights: how a run held them, and bases whose own files hold such weights.

Nothing can be merged into the latter, and their 16-bit source is named.

Such weights (bitsandbytes, GPTQ, AWQ and others) are packed integers with scales. A sum would have to be rounded to a
few bits once more, which loses most of what an adapter adds, so adapters are put into the model that was quantised.
"""

from pathlib import Path
from typing import Any, cast

import yaml

from llava_ft.checkpoint.directory import ModelDirectory, base_of_adapter
from llava_ft.checkpoint.names import CONFIG, RUN_CONFIG
from llava_ft.checkpoint.pickles import dict_or_empty
from llava_ft.errors import CheckpointError
from llava_ft.json_files import read_json
from llava_ft.tuning.quant import Quantization


def refuse_quantized(name: str, trained: ModelDirectory | None = None) -> None:
    """Refuse a base whose files hold quantised weights.

    Args:
        name: The base: a directory, or a name on the hub, about which nothing is known before it is fetched.
        trained: What was trained on it, if anything; its files may name the 16-bit model.

    Raises:
        CheckpointError: They do.
    """
    method = _method(Path(name))
    if method is None:
        return
    # The 16-bit model may be named by the files of the run, of its adapter or of the base itself.
    named: list[Any] = []
    if trained is not None:
        run_file = trained.path / RUN_CONFIG
        run = yaml.safe_load(run_file.read_text(encoding="utf-8")) if run_file.is_file() else None
        named += [dict_or_empty(run).get("model_name_or_path"), base_of_adapter(trained.path)]
    named.append(read_json(Path(name) / CONFIG).get("_name_or_path"))
    others = [str(other) for other in named if other and Path(other).resolve() != Path(name).resolve()]
    sources = [other for other in others if _method(Path(other)) is None]
    advice = f"That seems to be {sources[0]}." if sources else "No file here names it; see where the base came from."
    raise CheckpointError(
        f"The base model {name} holds weights quantised by {method}. Nothing is added to such weights: the sum would "
        "be rounded to a few bits once more. Give the 16-bit model that was quantised (--model-base; to train, "
        f"--model_name_or_path with bits=4, which quantises it as it is read). {advice}"
    )


def note_on_quantized(trained: ModelDirectory, base: ModelDirectory) -> list[str]:
    """Say that an adapter was trained on quantised weights of a model and not on those it is put into, if it was."""
    named = base_of_adapter(trained.path)
    method = _method(Path(named)) if named else None
    if method is None or Path(named).resolve() == base.path.resolve():
        return []
    return [
        f"{trained.path} was trained on {named}, whose weights are quantised by {method}. It is put into {base.path}, "
        "whose own weights and fingerprint differ from those by the rounding, so answers differ slightly from those "
        "in training"
    ]


def quantization_in_training(path: Path) -> Quantization | None:
    """Return how the language model was held in training, by the configuration in a directory; None for 16 bits.

    A directory without one, as the original writes it, says nothing and counts as 16 bits.

    Raises:
        CheckpointError: The configuration is damaged.
    """
    file = path / RUN_CONFIG
    if not file.is_file():
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        settings = cast("dict[str, Any]", content if isinstance(content, dict) else {})
        bits, quant_type = settings.get("bits", 16), settings.get("quant_type", "nf4")
        if bits not in (4, 8, 16) or quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bits is {bits} and quant_type {quant_type}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} cannot be read as a run's configuration ({error}). Copy it again.") from None
    return Quantization.from_flags(bits, quant_type, bool(settings.get("double_quant", True)))


def _method(directory: Path) -> str | None:
    """How the weights of a directory are quantised, in words; None if they are not, or if it is not here."""
    if not (directory / CONFIG).is_file():
        return None
    fields = read_json(directory / CONFIG).get("quantization_config")
    if not isinstance(fields, dict):
        return None
    fields = dict_or_empty(fields)
    method = str(fields.get("quant_method") or "an unknown method")
    bits = 4 if fields.get("load_in_4bit") else 8 if fields.get("load_in_8bit") else fields.get("bits")
    return f"{method} to {bits} bits" if bits else method
