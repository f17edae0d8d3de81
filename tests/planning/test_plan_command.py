"""`llava-ft plan`: what it prints, what it refuses, and how it exits."""

import json

import pytest
import torch

from llava_ft import cli
from llava_ft.args import parse_args
from llava_ft.errors import UserError
from llava_ft.planning.advice import WAYS
from llava_ft.planning.memory import MemoryPlanner
from llava_ft.planning.model import build_model, parameter_shapes
from llava_ft.planning.plan import summarise
from llava_ft.planning.request import parse_memory, plan_machine
from llava_ft.planning.workload import find_workload
from tests.conftest import RECORDINGS
from tests.planning.helpers import GPU_7B, LORA, plan_of, request_of, write_configs

GIB = 2**30
PAGE = RECORDINGS.parents[1] / "docs/how-to/plan.md"


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.main(["plan", *argv])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


class TestText:
    def test_the_verdict_comes_first(self, tmp_path, capsys):
        argv = write_configs(tmp_path)
        status, out, _ = run([*argv, "--gpu-memory", "24GiB"], capsys)
        assert status == cli.DONE
        assert out.splitlines()[0].startswith("Fits: 0.5")
        for heading in ("Parameters", "Memory per GPU in GiB", "Needed per GPU", "Disk per checkpoint", "Notes"):
            assert heading in out

    def test_a_run_that_does_not_fit_says_what_to_change(self, tmp_path, capsys):
        argv = [*write_configs(tmp_path), "--model_max_length", "256", "--per_device_train_batch_size", "8"]
        status, out, _ = run([*argv, "--gpu-memory", "522MiB"], capsys)
        assert status == cli.FAILED
        assert out.startswith("Does not fit: ")
        assert "--gradient_checkpointing full" in out
        assert "It fits with --per_device_train_batch_size 1 --gradient_accumulation_steps 8" in out

    def test_the_run_is_said_in_a_line(self, tmp_path, capsys):
        argv = [*write_configs(tmp_path), *LORA, "--bf16", "True", "--deepspeed", "zero3.json", "--gpus", "8"]
        _, out, _ = run([*argv, "--gpu-memory", "80GB"], capsys)
        assert "LoRA r=128, bfloat16, 8 GPUs, ZeRO-3, 2 x 1 x 8 = 16 samples a step" in out.splitlines()[1]

    def test_without_a_gpu_and_its_size_there_is_no_verdict(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        status, out, _ = run(write_configs(tmp_path), capsys)
        assert status == cli.DONE
        assert out.startswith("Needs ")
        assert "Give --gpu-memory" in out

    def test_columns_are_aligned(self, tmp_path, capsys):
        _, out, _ = run([*write_configs(tmp_path), "--gpu-memory", "24GiB"], capsys)
        table = out[out.index("Parameters") :].split("\n\n")[0].splitlines()
        assert len({len(line) for line in table}) == 1

    def test_a_run_on_the_cpu(self, tmp_path, capsys):
        status, out, _ = run([*write_configs(tmp_path), "--use_cpu", "True"], capsys)
        assert status == cli.DONE
        assert "this machine's memory" in out
        assert "CUDA" not in out


class TestJson:
    def test_is_complete(self, tmp_path, capsys):
        status, out, _ = run([*write_configs(tmp_path), "--gpu-memory", "24GiB", "--gpus", "2", "--json"], capsys)
        plan = json.loads(out)
        assert status == cli.DONE
        assert plan["fits"] is True
        assert set(plan) == {
            *("fits", "model", "machine", "run", "parameters", "batch", "memory"),
            *("epoch", "disk", "changes", "ways", "notes"),
        }
        assert plan["machine"]["world_size"] == 2
        memory = plan["memory"]
        assert memory["total"] == memory["tensors"] + sum(memory["allowances"].values())
        for phase, parts in memory["components"].items():
            assert memory["phases"][phase] == sum(parts.values())
        assert memory["tensors"] == memory["phases"][memory["peak_phase"]]
        assert memory["total_if_all_text_is_supervised"] >= memory["total"]
        assert plan["disk"]["checkpoint"]["total"] == sum(plan["disk"]["checkpoint"]["files"].values())

    def test_changes_are_planned_alone_and_together(self, tmp_path, capsys):
        argv = [*write_configs(tmp_path), "--model_max_length", "256", *LORA, "--gpu-memory", "1MiB", "--json"]
        status, out, _ = run(argv, capsys)
        plan = json.loads(out)
        assert status == cli.FAILED
        assert plan["fits"] is False
        assert [change["flags"].split()[0] for change in plan["changes"]] == [
            "--gradient_checkpointing",
            "--per_device_train_batch_size",
            "--bits",
            "--gradient_checkpointing",  # with the layers' inputs in the host's memory
            "--lora_r",
        ]  # offloading by DeepSpeed is not among them: its buffers are larger than such a model
        larger = [c["flags"] for c in plan["changes"] if c["alone"]["total"] >= plan["memory"]["total"]]
        assert set(larger) <= {"--bits 4"}  # in 4 bits PEFT computes LoRA, which keeps more than such a model's weights
        totals = [plan["memory"]["total"], *(change["with_those_before"]["total"] for change in plan["changes"])]
        assert totals == sorted(totals, reverse=True)


class TestFit:
    def argv(self, folder) -> list[str]:
        return [*write_configs(folder), "--model_max_length", "512", "--per_device_train_batch_size", "4", "--fit"]

    def test_the_flags_to_add_come_first(self, tmp_path, capsys):
        argv = [*self.argv(tmp_path), "--gradient_checkpointing", "full", "--gpu-memory", "24GiB"]
        status, out, _ = run(argv, capsys)
        assert status == cli.DONE
        assert out.startswith("Fits with --gradient_checkpointing none: ")
        assert "no gradient checkpointing" in out.splitlines()[1]
        [line] = [line for line in out.splitlines() if line.startswith("  --gradient_checkpointing none ")]
        assert "0.0%" in line
        assert line.endswith("GiB fits")

    def test_in_json_too(self, tmp_path, capsys):
        _, out, _ = run([*self.argv(tmp_path), "--gpu-memory", "24GiB", "--json"], capsys)
        plan = json.loads(out)
        assert plan["run"]["gradient_checkpointing"] == "none"
        total = plan["memory"]["total"]
        assert plan["ways"] == [
            {"flags": "--gradient_checkpointing none", "computed_again": 0.0, "total": total, "host": 0}
        ]

    def test_if_none_fits_it_says_what_else_to_change(self, tmp_path, capsys):
        status, out, _ = run([*self.argv(tmp_path), "--gpu-memory", "1MiB"], capsys)
        assert status == cli.FAILED
        assert out.startswith("Does not fit: ")
        for way in WAYS:
            assert f"  {way.flags}  " in out
        assert "--per_device_train_batch_size 1" in out

    def test_without_a_memory_to_fit_into_it_is_refused(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        status, out, err = run(self.argv(tmp_path), capsys)
        assert (status, out) == (cli.WRONG_REQUEST, "")
        assert "--fit chooses by the memory of a GPU, and this machine has no GPU. Give --gpu-memory" in err


class TestRefused:
    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["--gpus", "0"], "--gpus is 0. Allowed are whole numbers from 1."),
            (["--nodes", "-1"], "--nodes is -1"),
            (["--gpus", "many"], "invalid int value: 'many'"),
            (["--gpu-memory", "24"], "--gpu-memory is '24'. Allowed is a size with its unit, such as 24GiB"),
            (["--lora_rank", "8"], "lora_r"),
            (["--bits", "4", *LORA, "--deepspeed", "zero3.json"], "bits=4 does not work with ZeRO stage 3"),
            (["--bits", "4"], "quantised weights cannot be trained"),
            (["--deepspeed", "zero9.json"], "zero9.json"),
        ],
    )
    def test_wrong_requests(self, tmp_path, capsys, extra, message):
        status, out, err = run([*write_configs(tmp_path), *extra], capsys)
        assert status == cli.WRONG_REQUEST
        assert out == ""
        assert message in err

    def test_without_a_model(self, capsys):
        status, _, err = run(["--bf16", "True"], capsys)
        assert status == cli.WRONG_REQUEST
        assert "model_name_or_path is missing" in err


class TestMachine:
    @pytest.mark.parametrize(
        ("text", "num_bytes"),
        [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), ("40 g", 40 * GIB), ("0.5GiB", GIB // 2), ("512MiB", GIB // 2)],
    )
    def test_sizes(self, text, num_bytes):
        assert parse_memory(text) == num_bytes

    @pytest.mark.parametrize("text", ["", "24", "GiB", "-1GiB", "0GiB", "24 KiB"])
    def test_what_is_no_size(self, text):
        with pytest.raises(UserError, match="Allowed is a size with its unit"):
            parse_memory(text)

    def test_nodes_multiply(self):
        machine = plan_machine({}, gpus=4, nodes=2, gpu_memory="24GiB")
        assert (machine.world_size, machine.gpus_per_node) == (8, 4)


class TestOffload:
    def test_with_a_gpu_it_is_in_the_hosts_memory(self, tmp_path, capsys):
        argv = [*write_configs(tmp_path), "--bf16", "True", "--deepspeed", "zero2_offload.json"]
        _, out, _ = run([*argv, "--gpus", "2", "--gpu-memory", "24GiB"], capsys)
        assert "Host memory per machine, for what is offloaded" in out

    def test_on_a_cpu_it_is_the_ranks_own(self, tmp_path):
        argv = [*write_configs(tmp_path), "--use_cpu", "True", "--deepspeed", "zero2_offload.json"]
        memory = plan_of(argv).memory
        assert memory.host == {}
        assert memory.components["backward"]["offloaded"] > 0
        assert "offloaded" not in memory.components["start"]


class TestPrecision:
    def test_float16_is_float32_on_a_cpu(self, tmp_path):
        plan = plan_of([*write_configs(tmp_path), "--use_cpu", "True", "--fp16", "True"])
        assert plan.request.compute_dtype == torch.float32
        assert any("fp16 is replaced by float32" in note for note in plan.notes)

    def test_bfloat16_halves_frozen_weights(self, tmp_path):
        argv = [*write_configs(tmp_path), *LORA]
        sizes = {part.part: part.num_bytes for part in plan_of([*argv, "--bf16", "True"]).parts}
        for part in plan_of(argv).parts:
            trained = part.part in ("LoRA", "projector")
            assert part.num_bytes == sizes[part.part] * (1 if trained else 2)


@pytest.mark.slow
class TestPublished:
    @pytest.mark.parametrize(
        ("config", "gpus", "total"),
        [
            ("lora.yaml", 8, 22_516_754_061),
            ("finetune.yaml", 8, 34_144_198_029),
            ("qlora.yaml", 1, 13_174_050_387),
        ],
    )
    def test_recipes_take_what_was_recorded(self, config, gpus, total):
        """In bytes; docs/how-to/plan.md has them in GiB."""
        argv = ["--config", config]
        outline, request = request_of(argv, gpus=gpus)
        args = parse_args(argv, required=("model_name_or_path",))
        batch = find_workload(args, outline).largest_batch(request.batch_size)
        assert MemoryPlanner(outline).plan(request, batch).total == total
        assert f"| `{config}" in PAGE.read_text()
        assert f"| {gpus} | {total / GIB:.1f} GiB |" in PAGE.read_text()


def test_4_bits_hold_7b_in_a_quarter():
    outline, request = request_of([*GPU_7B, *LORA, "--bits", "4"])
    parts = summarise(parameter_shapes(build_model(outline, request), request), request)
    language = next(part for part in parts if part.part == "language model")
    assert language.num_bytes / language.parameters == pytest.approx(0.516, abs=0.001)
