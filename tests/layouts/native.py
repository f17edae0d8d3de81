"""Tiny checkpoints of every native layout: how original LLaVA, PEFT and this program lay models on disk.

Each function writes one and returns what it holds, computed here from the recorded tensors and not by reading what was
written: the whole model's tensors by their native names. All paths are absolute.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"
CLIP = GOLDEN / "ckpt/clip-tiny"
LANGUAGE_MODEL = GOLDEN / "ckpt/base-llm"
LORA_RUN = GOLDEN / "train/lora/llava-tiny-lora"

VISION = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PEFT = "base_model.model."
_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, and what is in it.

    Attributes:
        path: The directory.
        state: Every tensor of the whole model by its native name, the vision tower's too, float32.
        base: The model it was trained on; None for a whole model.
    """

    path: Path
    state: Tensors
    base: Path | None = None


Write = Callable[[Path], Checkpoint]


# Whole models


def v15(path: Path) -> Checkpoint:
    """LLaVA v1.5 as its authors published it: projector inside, vision tower in a directory of its own."""
    state = whole_state("llava15-tiny")
    _write_model(path, "llava15-tiny", without_tower(state))
    return Checkpoint(path, state)


def v15_bin_shards(path: Path) -> Checkpoint:
    """The same in `pytorch_model-*.bin` with their index, and the projector a second time beside them."""
    state = whole_state("llava15-tiny")
    _write_model(path, "llava15-tiny", {})
    write_bin_shards(path, without_tower(state))
    torch.save({name: value for name, value in state.items() if PROJECTOR in name}, path / "mm_projector.bin")
    return Checkpoint(path, state)


def v1_linear(path: Path) -> Checkpoint:
    """LLaVA v1: one linear layer as projector, `.bin` shards."""
    state = whole_state("llava1-tiny-linear")
    _write_model(path, "llava1-tiny-linear", {})
    write_bin_shards(path, without_tower(state))
    return Checkpoint(path, state)


def full_with_vision(path: Path) -> Checkpoint:
    """A full fine-tune that trained the vision tower and saved it with the rest."""
    state = whole_state("llava15-tiny-unfreezevt")
    state = {name: value * 1.25 if VISION in name else value for name, value in state.items()}
    _write_model(path, "llava15-tiny-unfreezevt", state)
    return Checkpoint(path, state)


def im_start_end(path: Path) -> Checkpoint:
    """A model with `<im_start>` and `<im_end>` in its vocabulary."""
    state = whole_state("llava15-tiny-imse")
    _write_model(path, "llava15-tiny-imse", without_tower(state))
    return Checkpoint(path, state)


def anyres(path: Path) -> Checkpoint:
    """LLaVA 1.6: tiled images, `image_newline`, the vision tower inside."""
    state = whole_state("llava16-tiny-anyres")
    _write_model(path, "llava16-tiny-anyres", state)
    return Checkpoint(path, state)


def s2(path: Path) -> Checkpoint:
    """A model that sees each image at several scales, so that its projector takes them side by side."""
    state = whole_state("llava15-tiny")
    wide = state[f"{PROJECTOR}0.weight"]
    state[f"{PROJECTOR}0.weight"] = torch.cat([wide, wide.flip(0) * 0.5], dim=1)
    changes = {"s2": True, "s2_scales": "56,112", "mm_hidden_size": 64}
    _write_model(path, "llava15-tiny", without_tower(state), changes)
    return Checkpoint(path, state)


# LoRA directories


def lora_bin(path: Path) -> Checkpoint:
    """A LoRA run of the original with `adapter_model.bin`, `non_lora_trainables.bin` beside it."""
    return _write_lora(path)


def lora_safetensors(path: Path) -> Checkpoint:
    """The same with `adapter_model.safetensors`, as PEFT writes it today."""
    checkpoint = _write_lora(path)
    save_file(torch.load(path / "adapter_model.bin", weights_only=True), path / "adapter_model.safetensors")
    (path / "adapter_model.bin").unlink()
    return checkpoint


def lora_prefixed(path: Path) -> Checkpoint:
    """Keys as wrappers leave them: `module.` in front, `model.` once more, and the adapter's name."""
    return _write_lora(
        path,
        adapter_key=lambda key: "module." + key.replace(".weight", ".default.weight"),
        beside_key=lambda key: key.replace(PEFT, PEFT + "model."),
    )


def lora_v1_linear(path: Path) -> Checkpoint:
    """LoRA on v1 with a linear projector, as liuhaotian's 0719-336px adapters."""
    linear = torch.load(GOLDEN / "ckpt/mm_projector_linear.bin", weights_only=True)
    return _write_lora(path, projector=linear, changes={"mm_projector_type": "linear"})


def lora_im_start_end(path: Path) -> Checkpoint:
    """LoRA with the two tokens added: both matrices of the vocabulary are written whole beside the adapter."""
    whole = whole_state("llava15-tiny-imse")
    matrices = {name: whole[name] for name in (EMBEDDINGS, HEAD)}
    config = json.loads((GOLDEN / "ckpt/llava15-tiny-imse/config.json").read_text())
    checkpoint = _write_lora(
        path, beside=matrices, changes={key: config[key] for key in ("mm_use_im_start_end", "vocab_size")}
    )
    for name in _TOKENIZER_FILES:
        file = GOLDEN / "ckpt/llava15-tiny-imse" / name
        if file.is_file():
            shutil.copyfile(file, path / name)
    return checkpoint


def lora_all_bin(path: Path) -> Checkpoint:
    """An intermediate checkpoint that holds adapter and projector together, in `adapter_model_all.bin`."""
    checkpoint = _write_lora(path)
    files = [path / "adapter_model.bin", path / "non_lora_trainables.bin"]
    everything = {key: value for file in files for key, value in torch.load(file, weights_only=True).items()}
    torch.save(everything, path / "adapter_model_all.bin")
    for file in files:
        file.unlink()
    return checkpoint


def lora_without_projector(path: Path) -> Checkpoint:
    """An intermediate checkpoint of the original: the adapter, without the projector that was trained with it."""
    checkpoint = _write_lora(path)
    (path / "non_lora_trainables.bin").unlink()
    (path / "trainer_state.json").write_text("{}")
    return checkpoint


def rslora(path: Path) -> Checkpoint:
    """rsLoRA (arXiv:2312.03732): the product is scaled by alpha / sqrt(r)."""
    return _write_lora(path, changes_adapter={"use_rslora": True}, scale=16 / 8**0.5)


def dora(path: Path) -> Checkpoint:
    """DoRA (arXiv:2402.09353): a magnitude for each row beside the matrices."""
    checkpoint = _write_lora(path, changes_adapter={"use_dora": True})
    base = llava_state()
    adapter = torch.load(path / "adapter_model.bin", weights_only=True)
    for key in [key for key in adapter if key.endswith("lora_A.weight")]:
        name = key.removeprefix(PEFT).removesuffix("lora_A.weight") + "weight"
        magnitude = base[name].norm(dim=1) * torch.linspace(0.9, 1.1, len(base[name]))
        adapter[key.replace("lora_A.weight", "lora_magnitude_vector")] = magnitude
        summed = checkpoint.state[name]
        checkpoint.state[name] = magnitude[:, None] / summed.norm(dim=1, keepdim=True) * summed
    torch.save(adapter, path / "adapter_model.bin")
    return checkpoint


# Projectors


def projector(path: Path) -> Checkpoint:
    """The directory of a projector run: `mm_projector.bin` and the configuration."""
    state = llava_state()
    run = GOLDEN / "train/pretrain_vt32/llava-tiny-pretrain"
    path.mkdir(parents=True)
    trained = torch.load(run / "mm_projector.bin", weights_only=True)
    torch.save(trained, path / "mm_projector.bin")
    _write_config(path, json.loads((run / "config.json").read_text()))
    return Checkpoint(path, state | {name: value.float() for name, value in trained.items()}, LANGUAGE_MODEL)


def projector_im_start_end(path: Path) -> Checkpoint:
    """A projector with the embeddings of the two added tokens, which the original writes as rows of their own."""
    whole = whole_state("llava15-tiny-imse")
    path.mkdir(parents=True)
    trained = {name: value for name, value in whole.items() if PROJECTOR in name}
    torch.save(trained | {EMBEDDINGS: whole[EMBEDDINGS][-2:].clone()}, path / "mm_projector.bin")
    _write_config(path, json.loads((GOLDEN / "ckpt/llava15-tiny-imse/config.json").read_text()))
    _copy_tokenizer(GOLDEN / "ckpt/llava15-tiny-imse", path)
    language_model = load_file(LANGUAGE_MODEL / "model.safetensors")
    state = llava_state() | trained
    state[EMBEDDINGS] = torch.cat([language_model[EMBEDDINGS], whole[EMBEDDINGS][-2:]])
    head = language_model[HEAD]
    state[HEAD] = torch.cat([head, head.mean(dim=0, keepdim=True).expand(2, -1)])
    return Checkpoint(path, state, LANGUAGE_MODEL)


# Parts


def whole_state(name: str) -> Tensors:
    """Return the tensors of a recorded whole model, float32."""
    directory = GOLDEN / "ckpt" / name
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    tensors: Tensors = {}
    for file in files:
        tensors |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return {key: value.float() for key, value in (_tower() | tensors).items()}


def llava_state() -> Tensors:
    """Return the tensors of the recorded language model and of the vision tower."""
    return load_file(LANGUAGE_MODEL / "model.safetensors") | _tower()


def without_tower(state: Tensors) -> Tensors:
    return {name: value for name, value in state.items() if VISION not in name}


def write_bin_shards(path: Path, state: Tensors, num_shards: int = 2) -> None:
    """Write `.bin` shards with their index."""
    names = [f"pytorch_model-{index + 1:05}-of-{num_shards:05}.bin" for index in range(num_shards)]
    keys = list(state)
    for index, name in enumerate(names):
        torch.save({key: state[key].clone() for key in keys[index::num_shards]}, path / name)
    weight_map = {key: names[position % num_shards] for position, key in enumerate(keys)}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _tower() -> Tensors:
    return {VISION + key: value for key, value in load_file(CLIP / "model.safetensors").items()}


def _write_model(path: Path, recorded: str, state: Tensors, changes: Mapping[str, Any] | None = None) -> None:
    """Write a whole model with the files of a recorded one; without a state, its weights are left out."""
    path.mkdir(parents=True)
    _write_config(path, json.loads((GOLDEN / "ckpt" / recorded / "config.json").read_text()) | dict(changes or {}))
    _copy_tokenizer(GOLDEN / "ckpt" / recorded, path)
    if state:
        save_file({name: value.contiguous() for name, value in state.items()}, path / "model.safetensors")


def _write_config(path: Path, config: dict[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(CLIP)}))


def _copy_tokenizer(source: Path, path: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, path / name)


def _write_lora(
    path: Path,
    *,
    projector: Tensors | None = None,
    beside: Tensors | None = None,
    changes: Mapping[str, Any] | None = None,
    changes_adapter: Mapping[str, Any] | None = None,
    scale: float = 16 / 8,
    adapter_key: Callable[[str], str] = str,
    beside_key: Callable[[str], str] = str,
) -> Checkpoint:
    """Write the recorded adapter as a LoRA directory.

    Args:
        path: The directory.
        projector: The projector that was trained with it; the recorded one when absent.
        beside: What else was trained beside it, by native name.
        changes: Fields of `config.json`.
        changes_adapter: Fields of `adapter_config.json`.
        scale: Factor of B A.
        adapter_key: Changes keys of the adapter file.
        beside_key: Changes keys of `non_lora_trainables.bin`.
    """
    path.mkdir(parents=True)
    adapter = load_file(LORA_RUN / "adapter_model.safetensors")
    recorded = torch.load(LORA_RUN / "non_lora_trainables.bin", weights_only=True)
    trained = projector or {key.removeprefix(PEFT): value.float() for key, value in recorded.items()}
    trained = trained | (beside or {})
    settings = json.loads((LORA_RUN / "adapter_config.json").read_text())
    settings |= {"base_model_name_or_path": str(LANGUAGE_MODEL)} | dict(changes_adapter or {})
    (path / "adapter_config.json").write_text(json.dumps(settings))
    _write_config(path, json.loads((LORA_RUN / "config.json").read_text()) | dict(changes or {}))
    torch.save({adapter_key(key): value for key, value in adapter.items()}, path / "adapter_model.bin")
    torch.save({beside_key(PEFT + name): value for name, value in trained.items()}, path / "non_lora_trainables.bin")
    state = llava_state() | trained
    for key, a in adapter.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix(PEFT).replace("lora_A.weight", "weight")
            state[name] = state[name] + scale * (adapter[key.replace("lora_A", "lora_B")].float() @ a.float())
    return Checkpoint(path, state, LANGUAGE_MODEL)
