"""An adapter for the other layout: LoRA matrices, and the projector that was trained beside them, under other names.

Values are not touched, unless another type is asked for. For transformers' layout everything is in one file, and the
projector is a module that PEFT saves whole (`modules_to_save`); for original LLaVA's it is in
`non_lora_trainables.bin`. PEFT passes over keys that it does not know without a word, so every export asks it which
keys it would take.

The way back gives the files of the source, byte for byte: their names, the order of the keys and the configuration lie
in the folder `source/` of what was exported.
"""

import copy
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from peft import LoraConfig, get_peft_model
from peft import get_peft_model_state_dict as _state_dict  # pyright: ignore[reportUnknownVariableType]

from llava_ft.checkpoint.adapter import LoraAdapter
from llava_ft.checkpoint.full_model import FullModel, ModelTensor
from llava_ft.checkpoint.hf.config import why_not_hf
from llava_ft.checkpoint.hf.names import module_name
from llava_ft.checkpoint.names import (
    ADAPTER_BIN,
    ADAPTER_CONFIG,
    ADAPTER_SAFETENSORS,
    CONFIG,
    EMBEDDINGS,
    HEAD,
    NON_LORA_BIN,
    PEFT_PREFIX,
    is_derived,
    plain_name,
)
from llava_ft.checkpoint.save import adapter_config_fields, config_fields, save_tensors, write_json
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert.export_hf import hf_config, image_settings, write_image_processor
from llava_ft.convert.hf_speaker import build_hf_skeleton
from llava_ft.convert.native_record import copy_files, num_native_rows, read_weight_record
from llava_ft.convert.proof import ConversionReport
from llava_ft.errors import CheckpointError, RunError
from llava_ft.json_files import read_json
from llava_ft.models.builder import build_skeleton
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.parts import any_in, module_part

Layout = Literal["llava", "hf"]

SOURCE_FOLDER: Final = "source"
_RECORD: Final = "adapter_files.json"
_WHOLE_INSTEAD: Final = "Export the whole model instead: leave --adapter-only out."


def export_adapter(
    whole: FullModel, target: Path, report: ConversionReport, layout: Layout, dtype: torch.dtype | None
) -> None:
    """Write an adapter into an empty directory for a layout, and compare it with the source.

    Values get the type `dtype`, or keep their own when it is None.

    Raises:
        UserError: The layout cannot hold the adapter.
        RunError: What is on disk afterwards is not what was to be written.
    """
    if not whole.adapters:
        raise CheckpointError(
            f"--adapter-only: {whole.directory.path} holds no LoRA adapter. Leave the flag out to export the model."
        )
    lora = whole.adapters[0][1]
    _check_layout(whole, lora, layout)
    tensors: dict[str, torch.Tensor] = {}  # by plain native name
    for files in lora.beside:
        wanted = {key: plain_name(key) for key in files.tensors if not is_derived(key)}
        for key, value in files.read(wanted).items():
            tensors[wanted[key]] = value if dtype is None else value.to(dtype)
            report.count(ModelTensor(wanted[key], tensors[wanted[key]], "replaced", str(files.path)))
    if not (dtype is None and _restore_source(lora.path, target, tensors, layout)):
        _write(whole, lora, target, tensors, layout)

    # What the way back needs: the configuration, and in which files and order the tensors were.
    folder = target / SOURCE_FOLDER
    folder.mkdir()
    copy_files(lora.path, folder, (ADAPTER_CONFIG, CONFIG))
    keys = [key for files in lora.beside for key in files.tensors]
    is_hf = any("language_model." in key or "multi_modal_projector." in key for key in keys)
    record = {
        "layout": "hf" if is_hf else "llava",
        "files": {files.path.name: list(files.tensors) for files in lora.beside},
        "exported": _digest(target / ADAPTER_CONFIG),
    }
    write_json(folder / _RECORD, record)

    written: dict[str, torch.Tensor] = {}
    for path in sorted(target.iterdir()):
        if path.suffix in (".bin", ".safetensors"):
            written |= {plain_name(key): value for key, value in WeightFiles.open(path).read().items()}
    if set(written) != set(tensors):
        raise RunError(
            f"{sorted(set(written) ^ set(tensors))[0]} is missing from what was written. Is the disk damaged?"
        )
    for name, value in tensors.items():
        if written[name].dtype != value.dtype or not torch.equal(written[name], value):
            raise RunError(f"{name} was written with other values. Is the disk damaged?")
    check_taken(target, whole.config, layout)

    changed = "bit for bit" if dtype is None else f"converted to {str(dtype).removeprefix('torch.')}"
    report.notes.append(f"all {len(tensors)} tensors are those of the source, {changed}")
    base = whole.base.directory
    if layout != ("hf" if base.layout == "hf" else "llava"):
        projector = " with the projector that its training started from" if base.kind == "language model" else ""
        report.notes.append(f"it goes on {base.path}{projector}, exported with --format {layout}")
    if layout == "hf" and any(".lora_" not in name for name in tensors):
        report.notes.append(
            "the projector was trained with it and is in modules_to_save, which vLLM does not serve: for vLLM export "
            "the whole model, without --adapter-only"
        )


def _check_layout(whole: FullModel, lora: LoraAdapter, layout: Layout) -> None:
    """Refuse an adapter that a layout cannot hold."""
    if whole.rows:
        raise CheckpointError(
            f"{lora.path} holds trained rows of added tokens ({', '.join(whole.rows)}), and an adapter has no place "
            f"for rows: PEFT would save the whole matrices. {_WHOLE_INSTEAD}"
        )
    reason = why_not_hf(whole.config) if layout == "hf" else None
    if reason is not None:
        raise CheckpointError(f"transformers' own layout cannot hold the base of {lora.path}: {reason}")
    others = sorted({name for names in lora.replaced for name in names.values() if module_part(name) != "projector"})
    if layout == "hf" and others:
        raise CheckpointError(
            f"{lora.path} holds {others[0]} and {len(others) - 1} other tensors that were trained beside the adapter. "
            f"Of those a PEFT adapter can hold the projector. {_WHOLE_INSTEAD}"
        )
    if layout == "llava" and ({EMBEDDINGS, HEAD} & set(others) or any_in("vision tower", [*others, *lora.changed])):
        raise CheckpointError(
            f"{lora.path} changes the vocabulary's matrices or the vision tower, which original LLaVA does not take "
            f"from an adapter. {_WHOLE_INSTEAD}"
        )


def _write(
    whole: FullModel, lora: LoraAdapter, target: Path, tensors: Mapping[str, torch.Tensor], layout: Layout
) -> None:
    """Write tensors and configurations anew; in the source's `adapter_config.json` what names modules changes."""
    beside = {PEFT_PREFIX + name: value for name, value in tensors.items() if ".lora_" not in name}
    if layout == "hf":
        renamed = {PEFT_PREFIX + module_name(name): value for name, value in tensors.items()}
        save_tensors(renamed, target / ADAPTER_SAFETENSORS)
        write_json(target / CONFIG, hf_config(whole, whole.dtype))
        write_image_processor(target, *image_settings(whole))
    else:
        matrices = {PEFT_PREFIX + name: value for name, value in tensors.items() if ".lora_" in name}
        save_tensors(matrices, target / ADAPTER_BIN)
        if beside:
            save_tensors(beside, target / NON_LORA_BIN)
        config = copy.deepcopy(whole.config)
        if whole.base.directory.layout == "hf":  # the vocabulary is that of the native base
            known = read_weight_record(whole.base.directory.path)
            at_least = known.num_rows if known is not None else 0
            config.vocab_size = num_native_rows(whole.tokenizer, config.vocab_size, at_least)
        write_json(target / CONFIG, config_fields(config, whole.dtype))

    fields = read_json(lora.path / ADAPTER_CONFIG)
    rename = module_name if layout == "hf" else str
    modules = {name: rename(name.removesuffix(".weight")) for name in lora.factors}
    patterns = {name: f"^{re.escape(module)}$" for name, module in modules.items()}
    ranks = {name: a.shape[0] for name, (a, _) in lora.factors.items()}
    rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    fields |= {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": target_expression(list(modules.values())),
        "rank_pattern": {patterns[name]: found for name, found in ranks.items() if found != rank},
        "alpha_pattern": {patterns[name]: found for name, found in lora.alphas.items() if found != alpha},
        "modules_to_save": ["model.multi_modal_projector"] if beside and layout == "hf" else None,
        "inference_mode": True,
    }
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping"):
        fields.pop(name, None)
    if layout == "hf":
        fields = dict(sorted(fields.items()))
    else:  # as original LLaVA's PEFT reads it, without keys that came later and have their default
        known = {name: value for name, value in fields.items() if name in LoraConfig.__dataclass_fields__}
        fields = adapter_config_fields(LoraConfig(**known))
    write_json(target / ADAPTER_CONFIG, fields)


def target_expression(modules: list[str]) -> str:
    """Write modules as one regular expression over whole names, short where all layers have the same ones."""
    by_stack: dict[str, dict[str, set[int]]] = {}
    alone: list[str] = []
    for module in modules:
        if match := re.match(r"(.*\.layers\.)(\d+)\.(.+)$", module):
            by_stack.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
        else:
            alone.append(re.escape(module))
    for stack, leaves in by_stack.items():
        numbers = sorted(set[int]().union(*leaves.values()))
        if all(len(found) == len(numbers) for found in leaves.values()):
            layers, names = "|".join(map(str, numbers)), "|".join(map(re.escape, sorted(leaves)))
            alone.append(f"{re.escape(stack)}(?:{layers})\\.(?:{names})")
        else:
            alone += [
                re.escape(f"{stack}{number}.{leaf}") for leaf in sorted(leaves) for number in sorted(leaves[leaf])
            ]
    return "|".join(alone)


def _restore_source(path: Path, target: Path, tensors: Mapping[str, torch.Tensor], layout: Layout) -> bool:
    """Write the files that an exported adapter came from, if they are known and nothing has changed since."""
    folder = path / SOURCE_FOLDER
    if not (folder / _RECORD).is_file():
        return False
    record = read_json(folder / _RECORD)
    files: dict[str, list[str]] = record["files"]
    names = {plain_name(key) for keys in files.values() for key in keys if not is_derived(key)}
    is_unchanged = record["exported"] == _digest(path / ADAPTER_CONFIG) and names == set(tensors)
    if record["layout"] != layout or not is_unchanged or any(Path(file).name != file for file in files):
        return False
    for file, keys in files.items():
        save_tensors({key: tensors[plain_name(key)] for key in keys if not is_derived(key)}, target / file)
    copy_files(folder, target, (ADAPTER_CONFIG, CONFIG))
    return True


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_taken(directory: Path, config: LlavaModelConfig, layout: Layout) -> None:
    """Check that PEFT takes every tensor of an adapter's file, and finds every tensor that it looks for.

    `PeftModel.from_pretrained` passes over keys that it does not know, and starts modules anew whose keys it does not
    find; both look like success. Here it is asked on a model without memory, of the configuration and layout given.

    Raises:
        RunError: It does not.
    """
    model: Any
    if layout == "hf":
        model = build_hf_skeleton(config, "float32")
    else:  # as original LLaVA has it when it puts an adapter on: the tower is loaded afterwards
        model = build_skeleton(config)
        del model.model.vision_tower
    adapter = cast("Any", LoraConfig).from_pretrained(str(directory))
    model.name_or_path = adapter.base_model_name_or_path  # PEFT compares the two, and warns
    wrapped = cast("Any", get_peft_model)(model, adapter, low_cpu_mem_usage=True)
    state = cast("Any", _state_dict)(wrapped, save_embedding_layers=False)  # or PEFT looks into the base's directory
    looked_for = {key: tuple(value.shape) for key, value in state.items()}
    files = [directory / name for name in (ADAPTER_BIN, ADAPTER_SAFETENSORS) if (directory / name).is_file()]
    found = {
        key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): info.shape
        for file in files
        for key, info in WeightFiles.open(file).tensors.items()
    }
    wrong = sorted(key for key in looked_for.keys() | found.keys() if looked_for.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        raise RunError(
            f"PEFT would not take the exported adapter as it is: {len(wrong)} keys, such as {key} "
            f"({looked_for.get(key, 'not looked for')} in its model, {found.get(key, 'missing')} in the file)."
        )
