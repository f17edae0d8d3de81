"""Starting from an earlier run, by numbers: which loss a run starts from, and what becomes of the adapter."""

import json
import logging
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.args import parse_args
from llava_ft.checkpoint.lineage import read_lineage
from llava_ft.checkpoint.manifest import what_is_incomplete
from llava_ft.cli import main
from llava_ft.errors import CheckpointError, RunError, UserError
from llava_ft.training.run import Run, prepare_run
from tests.conftest import RECORDINGS
from tests.training.helpers import flags, start, state_of, train

LORA = {"lora_dropout": "0", "validation_data_path": "data/mix.json"}
START = {
    "model_name_or_path": None,
    "vision_tower": None,
    "pretrain_mm_mlp_adapter": None,
    "mm_projector_type": None,
    "mm_vision_select_layer": None,
    **LORA,
}
"""A run that starts from another takes base, tower and projector from it."""


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a LoRA run; `loss.json` in it has its last evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECORDINGS)
        directory = tmp_path_factory.mktemp("earlier") / "lora"
        run = train(directory, learning_rate="5e-3", **LORA)
        (directory / "loss.json").write_text(json.dumps(loss_of(run)))
    return directory


@pytest.fixture(autouse=True)
def _there(in_recordings: Path):
    """Run where the recordings' paths lead somewhere."""


def prepare(output_dir: Path, method: str = "lora", **changes: object) -> Run:
    """Set up a run that starts from another one."""
    return prepare_run(parse_args(flags(output_dir, method, **(START | changes))))


def loss_of(run: Run) -> float:
    """The loss on the validation records."""
    return run.trainer.evaluate()["eval_loss"]


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.trainer.model.named_parameters() if p.requires_grad}


def last_loss(earlier: Path) -> float:
    return json.loads((earlier / "loss.json").read_text())


def copy_of(earlier: Path, target: Path) -> Path:
    shutil.copytree(earlier, target, ignore=shutil.ignore_patterns("checkpoint-*"))
    return target


def ignored_by(run: Run, folder: Path) -> list[str]:
    """What the lineage of the run's checkpoints says was passed over."""
    run.trainer.artifacts.write_manifest(folder, 0)
    lineage = read_lineage(folder)
    assert lineage is not None
    return lineage["details"]["ignored"]


class TestLosses:
    @pytest.mark.parametrize("how", [{"adapter_mode": "continue"}, {}], ids=["named", "by default"])
    def test_continue_starts_where_the_earlier_run_ended(self, tmp_path, earlier, how):
        run = prepare(tmp_path / "out", init_from=earlier, **how)
        assert loss_of(run) == last_loss(earlier)

    def test_the_original_flag_is_the_same(self, tmp_path, earlier):
        run = prepare(tmp_path / "out", lora_weight_path=earlier)
        assert loss_of(run) == last_loss(earlier)

    def test_new_starts_from_base_and_projector(self, tmp_path, earlier):
        run = prepare(tmp_path / "out", init_from=earlier, adapter_mode="new")
        projector = prepare_run(
            parse_args(flags(tmp_path / "plain", **LORA, pretrain_mm_mlp_adapter=earlier / "non_lora_trainables.bin"))
        )
        assert loss_of(run) == loss_of(projector)
        assert loss_of(run) != pytest.approx(last_loss(earlier), abs=1e-2)

    def test_new_may_have_other_settings(self, tmp_path, earlier):
        run = prepare(tmp_path / "out", init_from=earlier, adapter_mode="new", lora_r="2", lora_alpha="64")
        assert {p.shape[0] for name, p in trained(run).items() if "lora_A" in name} == {2}

    def test_merge_first_starts_at_the_loss_of_the_adapter(self, tmp_path, earlier):
        run = prepare(tmp_path / "out", init_from=earlier, adapter_mode="merge_first", lora_r="2")
        assert loss_of(run) == pytest.approx(last_loss(earlier), abs=1e-5)
        assert all((p == 0).all() for name, p in trained(run).items() if "lora_B" in name)
        report = json.loads((tmp_path / "out/merged_base/conversion_report.json").read_text())
        assert report["passed"]

    @pytest.mark.parametrize("method", ["full", "projector"])
    def test_a_run_without_adapter_trains_the_merged_model(self, tmp_path, earlier, method):
        changes = {"version": "v1", "data_path": "data/mix.json"}
        run = prepare(tmp_path / "out", method, init_from=earlier, adapter_mode="merge_first", **changes)
        assert loss_of(run) == pytest.approx(last_loss(earlier), abs=1e-5)

    def test_a_frozen_projector_is_that_of_the_earlier_run(self, tmp_path, earlier):
        run = prepare(tmp_path / "out", init_from=earlier, freeze_mm_mlp_adapter="True", mm_projector_lr=None)
        assert loss_of(run) == last_loss(earlier)
        assert all("lora_" in name for name in trained(run))

    def test_a_projector_run_is_gone_on_with(self, tmp_path):
        first = train(tmp_path / "projector", "projector", validation_data_path="data/pretrain.json")
        run = prepare(
            tmp_path / "out", "projector", init_from=tmp_path / "projector", validation_data_path="data/pretrain.json"
        )
        assert loss_of(run) == loss_of(first)
        assert run.trainer.artifacts.base == str(Path("ckpt/base-llm").resolve())
        lora = prepare(tmp_path / "lora", init_from=tmp_path / "projector", adapter_mode="new")
        after = dict(first.trainer.model.named_parameters())["model.mm_projector.0.weight"]
        assert torch.equal(trained(lora)["base_model.model.model.mm_projector.0.weight"], after)

    def test_a_whole_model_is_the_base(self, tmp_path):
        run = prepare(tmp_path / "out", init_from="ckpt/llava15-tiny")
        other = prepare_run(
            parse_args(flags(tmp_path / "plain", **(START | {"model_name_or_path": "ckpt/llava15-tiny"})))
        )
        assert loss_of(run) == loss_of(other)
        assert run.trainer.artifacts.base == str(Path("ckpt/llava15-tiny").resolve())

    def test_added_tokens_are_kept_in_every_mode(self, tmp_path):
        tokens = {"mm_use_im_start_end": "True", "learning_rate": "5e-3"}
        first = train(tmp_path / "first", max_steps=3, **LORA, **tokens)
        rows = trained(first)["base_model.model.model.embed_tokens.new_rows"]
        for mode in ("continue", "new"):
            run = prepare(tmp_path / mode, init_from=tmp_path / "first", adapter_mode=mode)
            assert torch.equal(trained(run)["base_model.model.model.embed_tokens.new_rows"], rows)
        merged = prepare(tmp_path / "merged", init_from=tmp_path / "first", adapter_mode="merge_first")
        assert loss_of(merged) == pytest.approx(loss_of(first), abs=1e-5)
        whole = prepare(tmp_path / "full", "full", init_from=tmp_path / "first", adapter_mode="new")
        assert torch.equal(trained(whole)["model.embed_tokens.weight"][-2:], rows)

    def test_rows_of_added_tokens_in_files_of_the_original(self, tmp_path):
        """The original writes the matrices alone."""
        first = train(tmp_path / "first", max_steps=3, mm_use_im_start_end="True", learning_rate="5e-3", **LORA)
        file = tmp_path / "first/non_lora_trainables.bin"
        tensors = torch.load(file, weights_only=True)
        torch.save({key: value for key, value in tensors.items() if not key.endswith("new_rows")}, file)
        (tmp_path / "first/llava_ft.json").unlink()
        run = prepare(tmp_path / "continue", init_from=tmp_path / "first")
        assert loss_of(run) == loss_of(first)


class TestResuming:
    @pytest.mark.parametrize("mode", ["continue", "new", "merge_first"])
    def test_a_run_that_was_interrupted_ends_the_same(self, tmp_path, earlier, mode, caplog):
        def whole() -> Run:
            run = prepare(tmp_path / "out", init_from=earlier, adapter_mode=mode)
            run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
            return run

        straight = whole()
        merged = tmp_path / "out/merged_base"
        written = merged.stat().st_mtime_ns if merged.exists() else 0
        shutil.rmtree(tmp_path / "out/checkpoint-6")
        with caplog.at_level(logging.INFO, logger="llava_ft"):
            resumed = whole()
        assert resumed.checkpoint == tmp_path / "out/checkpoint-3"
        one, other = state_of(straight), state_of(resumed)
        assert all(torch.equal(one[name], other[name]) for name in one)
        lineage = read_lineage(tmp_path / "out/checkpoint-6")
        assert lineage is not None
        assert [entry["from"] for entry in lineage["details"]["resumptions"]] == [str(resumed.checkpoint)]
        assert len(lineage["parents"]) == (0 if mode == "merge_first" else 1)
        if mode == "merge_first":
            assert merged.stat().st_mtime_ns == written
            assert "was merged before" in caplog.text

    def test_a_checkpoint_of_another_start_is_refused(self, tmp_path, earlier):
        first = prepare(tmp_path / "out", init_from=earlier, max_steps=3)
        first.trainer.train()
        with pytest.raises(CheckpointError, match=r"started from .*lora \(continue\), and this one .*lora \(new\)"):
            prepare(tmp_path / "out", init_from=earlier, adapter_mode="new")
        with pytest.raises(CheckpointError, match=r"and this one is to start from its base alone"):
            prepare_run(parse_args(flags(tmp_path / "out", **LORA)))
        prepare(tmp_path / "out", init_from=earlier, adapter_mode="new", force="True")

    def test_another_adapter_is_not_merged_over_the_first(self, tmp_path, earlier):
        prepare(tmp_path / "out", init_from=earlier, adapter_mode="merge_first")
        train(tmp_path / "other", max_steps=1)
        with pytest.raises(UserError, match=r"merged_base was merged from something else than .*other"):
            prepare(tmp_path / "out", init_from=tmp_path / "other", adapter_mode="merge_first")

    @pytest.mark.slow
    def test_a_killed_merge_leaves_nothing_that_counts(self, tmp_path, earlier):
        argv = flags(tmp_path / "out", **(START | {"init_from": earlier, "adapter_mode": "merge_first"}))
        process = start(argv)
        staging = tmp_path / "out/.merged_base.incomplete"
        deadline = time.monotonic() + 120
        while not staging.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out/merged_base").exists()
        run = prepare(tmp_path / "out", init_from=earlier, adapter_mode="merge_first")
        assert what_is_incomplete(tmp_path / "out/merged_base") is None
        assert not staging.exists()
        assert loss_of(run) == pytest.approx(last_loss(earlier), abs=1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"init_from": "nowhere"}, "init_from=nowhere cannot be started from. .*does not exist"),
            ({"init_from": "ckpt/clip-tiny"}, "init_from=ckpt/clip-tiny holds a vision tower alone"),
            ({"init_from": "ckpt/llava15-tiny", "adapter_mode": "merge_first"}, "no adapter, so there is nothing to"),
            (
                {"init_from": "ckpt/llava15-tiny", "model_name_or_path": "ckpt/base-llm"},
                "holds a whole model, and model_name_or_path=ckpt/base-llm names another",
            ),
        ],
    )
    def test_what_cannot_be_started_from(self, tmp_path, change, message):
        with pytest.raises(CheckpointError, match=message):
            prepare(tmp_path / "out", **change)
        assert not (tmp_path / "out").exists()

    def test_an_adapter_needs_a_run_that_trains_one_or_a_mode(self, tmp_path, earlier):
        with pytest.raises(CheckpointError, match=r"this run trains none. Add lora_enable .*merge_first"):
            prepare(tmp_path / "out", "full", init_from=earlier)

    def test_other_settings_of_the_adapter(self, tmp_path, earlier, caplog):
        with pytest.raises(CheckpointError, match=r"r is 4 in it and 8 here. Use the same\."):
            prepare(tmp_path / "out", init_from=earlier, lora_r="8", force="True")
        with pytest.raises(CheckpointError, match=r"lora_alpha is 8 in it and 16 here. Use the same, or pass --force"):
            prepare(tmp_path / "out", init_from=earlier, lora_alpha="16")
        run = prepare(tmp_path / "out", init_from=earlier, lora_alpha="16", force="True")
        assert "Ignored: The adapter in" in caplog.text
        assert loss_of(run) != last_loss(earlier)
        assert any("lora_alpha is 8" in line for line in ignored_by(run, tmp_path))

    def test_another_base_is_refused_before_weights_are_read(self, tmp_path, earlier, caplog):
        other = tmp_path / "other-base"
        shutil.copytree("ckpt/base-llm", other)
        weights = load_file(other / "model.safetensors")
        save_file({key: value * 1.5 for key, value in weights.items()}, other / "model.safetensors")
        for mode in ("continue", "new", "merge_first"):
            changes = {"init_from": earlier, "adapter_mode": mode, "model_name_or_path": other}
            with (
                caplog.at_level(logging.INFO, logger="llava_ft"),
                pytest.raises(CheckpointError, match="weights differ"),
            ):
                prepare(tmp_path / mode, **changes)
            assert "Weights:" not in caplog.text
            assert not (tmp_path / mode / "merged_base").exists()
            caplog.clear()
            prepare(tmp_path / mode, **changes, force="True")
            assert "Ignored: " in caplog.text
            assert "whose weights differ" in caplog.text

    def test_files_of_two_runs(self, tmp_path, earlier):
        mixed = copy_of(earlier, tmp_path / "mixed")
        train(tmp_path / "two", max_steps=1)
        shutil.copy(tmp_path / "two/non_lora_trainables.bin", mixed)
        for mode in ("continue", "new", "merge_first"):
            with pytest.raises(CheckpointError, match="is damaged or of another run"):
                prepare(tmp_path / mode, init_from=mixed, adapter_mode=mode)
            run = prepare(tmp_path / mode, init_from=mixed, adapter_mode=mode, force="True")
            assert len(ignored_by(run, tmp_path)) == 1

    @pytest.mark.parametrize("name", ["adapter_model.bin", "non_lora_trainables.bin"])
    def test_a_truncated_file(self, tmp_path, earlier, name):
        damaged = copy_of(earlier, tmp_path / "damaged")
        content = (damaged / name).read_bytes()
        (damaged / name).write_bytes(content[: len(content) // 2])
        for force in ("False", "True"):
            with pytest.raises(CheckpointError, match=f"{name}.*(is damaged|cannot be read)"):
                prepare(tmp_path / "out", init_from=damaged, force=force)
        (damaged / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            prepare(tmp_path / "out", init_from=damaged)

    def test_a_base_that_has_moved(self, tmp_path, earlier):
        moved = copy_of(earlier, tmp_path / "moved")
        (moved / "adapter_config.json").write_text(
            (moved / "adapter_config.json").read_text().replace("base-llm", "no-base")
        )
        with pytest.raises(CheckpointError, match=r"was trained on .*no-base, which does not exist here"):
            prepare(tmp_path / "out", init_from=moved)
        assert loss_of(prepare(tmp_path / "out", init_from=moved, model_name_or_path="ckpt/base-llm")) == last_loss(
            earlier
        )


def test_from_the_command_line_to_a_merged_answer(tmp_path, earlier, capsys):
    """Each result is used as what training saw: beside its base and merged."""
    for mode in ("continue", "new", "merge_first"):
        out = tmp_path / mode
        argv = flags(out, **(START | {"init_from": earlier, "adapter_mode": mode, "max_steps": 3}))
        assert main(["train", *argv]) == 0, capsys.readouterr().err
        merged = tmp_path / f"{mode}-merged"
        assert main(["merge", "--model-path", str(out), "--save-model-path", str(merged)]) == 0
        answers: list[str] = []
        capsys.readouterr()
        for model in (out, merged):
            asked = ["--query", "What is this?", "--image-file", "images/src/bilevel.png", "--max-new-tokens", "8"]
            assert main(["generate", "--model-path", str(model), *asked]) == 0
            answers.append(capsys.readouterr().out)
        assert answers[0] == answers[1] != ""
        lineage = read_lineage(merged)
        assert lineage is not None
        (parent,) = lineage["parents"]
        assert parent["path"] == str(out.resolve())
        if mode == "merge_first":  # the merged base is the base of both, and described once
            assert lineage["base"] is not None
            assert parent["lineage"]["base"]["left_out"] == "described above"
            chain = lineage["base"]["lineage"]["parents"]
        else:
            chain = parent["lineage"]["parents"]
        assert [entry["path"] for entry in chain] == [str(earlier.resolve())]
        assert main(["inspect", "lineage", str(merged)]) == 0
        assert str(earlier) in capsys.readouterr().out


def test_a_full_disk_while_merging(tmp_path, earlier, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llava_ft.convert.merge.prove_tensors", full)
    with pytest.raises(RunError, match=r"merged_base could not be written: No space left on device"):
        prepare(tmp_path / "out", init_from=earlier, adapter_mode="merge_first")
    assert [path.name for path in (tmp_path / "out").iterdir()] == []
