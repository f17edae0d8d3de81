"""What each column of the compatibility table means: it is done, and the result is compared by numbers."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from llava_ft.args import parse_args
from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.full_model import open_full_model
from llava_ft.cli import main
from llava_ft.conversation import get_template
from llava_ft.convert.export_gguf import load_gguf
from llava_ft.convert.hf_speaker import HfSpeaker
from llava_ft.convert.proof import ConversionReport
from llava_ft.convert.verify import NativeSpeaker, Record, Speaker, fixed_questions, prove, record
from llava_ft.data.images import ImageTransform
from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.errors import UserError
from llava_ft.inference.dialogue import Picture
from llava_ft.inference.generate import build_prompt
from llava_ft.inference.load import LoadedModel, load_model
from llava_ft.inference.responder import Responder, Sampling
from llava_ft.models.builder import build_skeleton, settle_config
from llava_ft.models.towers import tower_fields
from llava_ft.training.run import Run, prepare_run
from tests.compatibility.runs import OwnRun
from tests.layouts.native import CLIP, GOLDEN, Checkpoint
from tests.training.helpers import flags

SAME, EXPORTED = 1e-5, 1e-4
"""Largest difference of logits, as a share of the largest logit, between float32 models: with the same weights summed
in another order; and after an export, in another program."""

IMAGE = GOLDEN / "images/src/landscape.jpg"
QUESTION = "What is it?"
FROM_THE_CHECKPOINT = dict.fromkeys(
    ("mm_projector_type", "mm_vision_select_layer", "image_aspect_ratio", "pretrain_mm_mlp_adapter", "vision_tower")
)
"""Flags of the small runs that a checkpoint settles itself."""


@dataclass
class Case:
    """A row of the table with what has been made of it so far.

    Attributes:
        checkpoint: The files and what is in them.
        folder: For what is made of it.
        flags: Further flags of a run that starts from it.
        own: The run that wrote it, if this program did.
    """

    checkpoint: Checkpoint
    folder: Path
    flags: Mapping[str, Any] = field(default_factory=dict)
    own: OwnRun | None = None

    @property
    def source(self) -> list[str]:
        """The flags that name it on a command line."""
        base = ["--model-base", str(self.checkpoint.base)] if self.checkpoint.base else []
        return ["--model-path", str(self.checkpoint.path), *base]

    @cached_property
    def model(self) -> LoadedModel:
        """The model made of the tensors that ought to be in the files, without reading them."""
        return _model_of(self.checkpoint)

    @cached_property
    def expected(self) -> list[Record]:
        """What it says."""
        return record(NativeSpeaker(self.model), fixed_questions(self.model))

    def compare(self, got: Speaker, bound: float) -> None:
        """Compare logits and greedy answers on the fixed questions."""
        prove(ConversionReport("", "", ""), self.expected, got, bound)


def _model_of(checkpoint: Checkpoint) -> LoadedModel:
    fields = identify(checkpoint.path).config or identify(cast("Path", checkpoint.base)).config
    fields = fields | {"model_type": "llava_llama", "vocab_size": len(checkpoint.state["model.embed_tokens.weight"])}
    described = fields.get("mm_vision_config") or json.loads((CLIP / "config.json").read_text())
    config = settle_config(
        fields, str(checkpoint.path), wishes={}, vision_tower=str(CLIP), vision=tower_fields(described, str(CLIP))
    )
    model = build_skeleton(config)
    model.load_state_dict(checkpoint.state, assign=True)
    has_tokenizer = (checkpoint.path / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(checkpoint.path if has_tokenizer else checkpoint.base or checkpoint.path)
    transform = ImageTransform.from_pretrained(CLIP, geometry=config.image_geometry)
    return LoadedModel(tokenizer, model.eval(), transform, "v1", 2048, cast("Any", None))


def load(case: Case) -> None:
    """The model in memory has every tensor of the files, to 1e-6; same logits and answers."""
    checkpoint = case.checkpoint
    loaded = load_model(str(checkpoint.path), str(checkpoint.base) if checkpoint.base else None, dtype=torch.float32)
    found = loaded.model.state_dict()
    assert found.keys() == checkpoint.state.keys()
    for name, value in checkpoint.state.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6, msg=name)
    case.compare(NativeSpeaker(loaded), SAME)


def train(case: Case) -> None:
    """A LoRA run of two steps starts from it, with `--model_name_or_path` or `--init_from`; rsLoRA, DoRA and adapters
    that PEFT made with `--adapter_mode merge_first`. Before the first step: same logits and answers. After the last
    one, all that is trained has changed, and nothing else.
    """
    run = _prepare(case)
    run.trainer.model.eval()
    case.compare(NativeSpeaker(replace(case.model, model=run.trainer.model)), SAME)
    before = {name: value.detach().clone() for name, value in run.trainer.model.named_parameters()}
    _finish(run)
    for name, value in run.trainer.model.named_parameters():
        assert torch.equal(value, before[name]) != value.requires_grad, name
    assert (case.folder / "run/checkpoint-2").is_dir()


def resume(case: Case) -> None:
    """That run, resumed from its first checkpoint, writes the same weights bit for bit; for this program's checkpoints,
    the run that wrote them.
    """
    if case.own is not None:
        case.own.start(case.folder / "resumed", resume_from_checkpoint=str(case.checkpoint.path))
        _compare_files(case.folder / "earlier", case.folder / "resumed")
        return
    straight, stopped = case.folder / "run", case.folder / "resumed"
    if not (straight / "checkpoint-2").is_dir():
        _finish(_prepare(case))
    stopped.mkdir()
    shutil.copytree(straight / "checkpoint-1", stopped / "checkpoint-1")
    run = _prepare(case, output="resumed")
    assert run.checkpoint == stopped / "checkpoint-1"
    _finish(run)
    _compare_files(straight, stopped)


def merge(case: Case) -> None:
    """`llava-ft merge`; same logits and answers."""
    merged = case.folder / "merged"
    _run("merge", *case.source, "--save-model-path", str(merged), "--no-verify")
    case.compare(NativeSpeaker(load_model(str(merged), dtype=torch.float32)), SAME)


def generate(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """`llava-ft generate` prints the same answer to a question about a picture."""
    template = get_template("v1")
    prompt = build_prompt(QUESTION, 1, template, mm_use_im_start_end=case.model.model.config.mm_use_im_start_end)
    written: list[str] = []  # the pieces: a byte that begins no character may be written before it is known as such
    pictures, sampling = [Picture.read(str(IMAGE))], Sampling(max_new_tokens=12)
    Responder(case.model).answer(prompt, pictures, template, sampling, write=written.append)
    ask = ["--image-file", str(IMAGE), "--query", QUESTION, "--conv-mode", "v1", "--max-new-tokens", "12"]
    capsys.readouterr()
    _run("generate", *case.source, *ask, "--temperature", "0")
    assert capsys.readouterr().out.strip() == "".join(written).strip()


def export_hf(case: Case) -> None:
    """`llava-ft export --format hf`; plain transformers loads it without missing or unexpected keys; same logits and
    answers.
    """
    case.compare(HfSpeaker.load(_export(case, "hf"), torch.float32), EXPORTED)


def export_llava(case: Case) -> None:
    """`llava-ft export --format llava`, read again; same logits and answers."""
    case.compare(NativeSpeaker(load_model(str(_export(case, "llava")), dtype=torch.float32)), SAME)


def export_gguf(case: Case) -> None:
    """`llava-ft export --format gguf`; a model made of the two files gives the same logits and answers."""
    target = _export(case, "gguf")
    base = str(case.checkpoint.base) if case.checkpoint.base else None
    whole = open_full_model(identify(case.checkpoint.path), base)
    case.compare(NativeSpeaker(load_gguf(target, whole)), EXPORTED)


COLUMNS: dict[str, Callable[..., None]] = {
    "load": load,
    "train": train,
    "resume": resume,
    "merge": merge,
    "generate": generate,
    "export hf": export_hf,
    "export llava": export_llava,
    "export gguf": export_gguf,
}


def _export(case: Case, form: str) -> Path:
    target = case.folder / form
    _run("export", *case.source, "--save-path", str(target), "--format", form, "--dtype", "float32", "--no-verify")
    return target


def _run(*argv: str) -> None:
    """Run a command in this process.

    Raises:
        UserError: It ended with status 2; the message is the one on the screen.
    """
    said: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("llava_ft")
    logger.addHandler(handler)
    try:
        status = main(list(argv))
    finally:
        logger.removeHandler(handler)
    if status == 2:
        raise UserError(said[-1])
    assert status == 0, said


def _prepare(case: Case, output: str = "run") -> Run:
    checkpoint = case.checkpoint
    start = (
        {"model_name_or_path": str(checkpoint.base), "init_from": str(checkpoint.path)}
        if checkpoint.base
        else {"model_name_or_path": str(checkpoint.path)}
    )
    small = {"max_steps": 2, "save_steps": 1, "lora_dropout": 0, "group_by_modality_length": None}
    given = FROM_THE_CHECKPOINT | small | start | dict(case.flags)
    return prepare_run(parse_args(flags(case.folder / output, "lora", **given)))


def _finish(run: Run) -> None:
    run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    run.trainer.save_model()


def _compare_files(expected: Path, found: Path) -> None:
    files = [file for file in expected.iterdir() if file.suffix in (".bin", ".safetensors")]
    assert files
    for file in files:
        assert file.read_bytes() == (found / file.name).read_bytes(), file.name
