#!/usr/bin/env python3
"""Compares the memory that `llava-ft plan` predicts with what training really takes.

    python benchmarks/plan_memory.py [NAME ...] [--list] [--output benchmarks/results]

Each configuration is trained for two optimizer steps by llava_ft's own trainer, in a process of its own, on a LLaVA of
random weights that is made on the fly. On a CPU the peak is that of the process's resident memory (`VmHWM`) from the
moment when the model is about to be loaded, beyond what Python and torch had then: a tiny run goes before in the same
process, so that libraries, kernels and their scratch memory are loaded. With a GPU the same configurations run on it
too, and the peak is `torch.cuda.max_memory_allocated`, which the prediction is compared with before its allowances for
CUDA's context and fragmentation.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from machine import where
from random_model import WORDS, write_model

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20

MODELS = {
    "tiny": {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 2, "vision": 64, "vision_layers": 2},
    "60M": {"hidden": 512, "intermediate": 1376, "layers": 8, "heads": 8, "vision": 256, "vision_layers": 6},
    "140M": {"hidden": 768, "intermediate": 2048, "layers": 12, "heads": 12, "vision": 384, "vision_layers": 8},
}
IMAGE_SIZE, PATCH_SIZE, VOCABULARY = 224, 14, 32000

BASE = {
    "version": "v1",
    "image_aspect_ratio": "pad",
    "model_max_length": 512,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "seed": 1,
}
LORA = {"lora_enable": True, "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.05}
CHECKPOINTING = {"gradient_checkpointing": "full"}
SELECTIVE = {"gradient_checkpointing": "selective"}
PEFT = {"fast_lora": False}


@dataclass(frozen=True)
class Case:
    """One run to be predicted and measured."""

    model: str
    flags: dict = field(default_factory=dict)
    ranks: int = 1
    zero: dict | None = None
    varied_lengths: bool = False


def zero(stage: int, **options) -> dict:
    """A DeepSpeed configuration as those in configs/, with buckets for small models."""
    return {
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 4_000_000, **options},
    }


HOST = {"device": "cpu", "pin_memory": False}
LITTLE_KEPT = {
    "stage3_max_reuse_distance": 10_000_000,
    "stage3_max_live_parameters": 20_000_000,
    "stage3_prefetch_bucket_size": 2_000_000,
    "stage3_param_persistence_threshold": 10_000,
}
CASES = {
    "full": Case("60M"),
    "full, checkpointing": Case("60M", CHECKPOINTING),
    "full, checkpointing, batch 4": Case("60M", CHECKPOINTING | {"per_device_train_batch_size": 4}),
    "full, accumulation": Case("60M", {"gradient_accumulation_steps": 2}),
    "full, 140M": Case("140M", CHECKPOINTING | {"per_device_train_batch_size": 1}),
    "full, bf16": Case("60M", {"bf16": True}),
    "full, sgd": Case("60M", {"optim": "sgd"}),
    "full, adafactor": Case("60M", {"optim": "adafactor"}),
    "full, adamw_8bit": Case("60M", {"optim": "adamw_8bit"}),
    "lora": Case("60M", LORA),
    "lora, varied lengths": Case("60M", LORA | {"per_device_train_batch_size": 4}, varied_lengths=True),
    "lora, eager attention": Case("60M", LORA | {"attn_implementation": "eager"}),
    "lora, checkpointing": Case("60M", LORA | CHECKPOINTING | {"per_device_train_batch_size": 4}),
    "lora, checkpointing, length 1024": Case("60M", LORA | CHECKPOINTING | {"model_max_length": 1024}),
    "lora, bf16": Case("60M", LORA | {"bf16": True}),
    "lora, 140M": Case("140M", LORA | {"per_device_train_batch_size": 1}),
    "lora, 140M, checkpointing": Case("140M", LORA | CHECKPOINTING | {"per_device_train_batch_size": 4}),
    "lora, nf4": Case("140M", LORA | {"bits": 4, "bf16": True}),
    "lora, nf4, checkpointing": Case("140M", LORA | CHECKPOINTING | {"bits": 4, "per_device_train_batch_size": 4}),
    "lora, int8": Case("140M", LORA | {"bits": 8}),
    "projector": Case("60M", {"tune_mm_mlp_adapter": True}),
    "projector, checkpointing": Case("60M", {"tune_mm_mlp_adapter": True} | CHECKPOINTING),
    "full, sgd, selective": Case("60M", SELECTIVE | {"optim": "sgd"}),
    "full, sgd, every 2nd layer": Case("60M", CHECKPOINTING | {"optim": "sgd", "gradient_checkpointing_every": 2}),
    "lora, selective": Case("60M", LORA | SELECTIVE),
    "lora, PEFT": Case("60M", LORA | PEFT),
    "lora, PEFT, checkpointing": Case("60M", LORA | PEFT | CHECKPOINTING),
    "lora, PEFT, selective": Case("60M", LORA | PEFT | SELECTIVE),
    "lora, PEFT, bf16, selective": Case("60M", LORA | PEFT | SELECTIVE | {"bf16": True}),
    "lora, PEFT, eager attention, selective": Case("60M", LORA | PEFT | SELECTIVE | {"attn_implementation": "eager"}),
    "lora, 140M, every 4th layer": Case("140M", LORA | CHECKPOINTING | {"gradient_checkpointing_every": 4}),
    "lora, inputs in host memory": Case("60M", LORA | CHECKPOINTING | {"activation_offload": True}),
    "lora, nf4, PEFT, selective": Case("140M", LORA | PEFT | SELECTIVE | {"bits": 4, "bf16": True}),
    "lora, int8, selective": Case("140M", LORA | SELECTIVE | {"bits": 8}),
    "projector, selective": Case("60M", {"tune_mm_mlp_adapter": True} | SELECTIVE),
    "full, ZeRO-1": Case("60M", CHECKPOINTING, zero=zero(1)),
    "full, ZeRO-2": Case("60M", CHECKPOINTING, zero=zero(2)),
    "full, ZeRO-2, bf16": Case("60M", CHECKPOINTING | {"bf16": True}, zero=zero(2)),
    "full, ZeRO-2, 2 ranks": Case("60M", CHECKPOINTING, ranks=2, zero=zero(2)),
    "full, ZeRO-2, bf16, 2 ranks": Case("60M", CHECKPOINTING | {"bf16": True}, ranks=2, zero=zero(2)),
    "full, ZeRO-3": Case("60M", CHECKPOINTING, zero=zero(3)),
    "full, ZeRO-3, 2 ranks": Case("60M", CHECKPOINTING, ranks=2, zero=zero(3)),
    "full, ZeRO-2, accumulation": Case("60M", CHECKPOINTING | {"gradient_accumulation_steps": 2}, zero=zero(2)),
    "full, ZeRO-2 offload, bf16": Case("60M", CHECKPOINTING | {"bf16": True}, zero=zero(2, offload_optimizer=HOST)),
    "full, ZeRO-3, bf16": Case("60M", CHECKPOINTING | {"bf16": True}, zero=zero(3)),
    "full, ZeRO-3, bf16, 2 ranks": Case("60M", CHECKPOINTING | {"bf16": True}, ranks=2, zero=zero(3)),
    "lora, ZeRO-3, 2 ranks, little kept": Case("140M", LORA | CHECKPOINTING, ranks=2, zero=zero(3, **LITTLE_KEPT)),
    "lora, ZeRO-3, bf16, 2 ranks": Case("140M", LORA | CHECKPOINTING | {"bf16": True}, ranks=2, zero=zero(3)),
    "lora, DDP, 2 ranks": Case("60M", LORA | CHECKPOINTING, ranks=2),
}


def make_model(directory: Path, name: str, *, image_size: int = IMAGE_SIZE) -> None:
    """Write a LLaVA of random weights, its tower inside, with the tokenizer of data/tiny-llava.

    Args:
        directory: Where it is written.
        name: Its sizes, one of MODELS.
        image_size: Pixels of a side of the images that the tower takes.
    """
    sizes = MODELS[name]
    language = {
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["intermediate"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
    }
    tower = {
        "hidden_size": sizes["vision"],
        "intermediate_size": 4 * sizes["vision"],
        "num_hidden_layers": sizes["vision_layers"],
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": PATCH_SIZE,
    }
    write_model(directory, language, tower)


def make_data(directory: Path) -> None:
    """Write one picture, records that are all longer than any limit, and records of different lengths."""
    from PIL import Image

    directory.mkdir(parents=True)
    rng = random.Random(1)
    Image.frombytes("RGB", (64, 64), rng.randbytes(64 * 64 * 3)).save(directory / "noise.png")

    def record(num_words: int) -> dict:
        question = " ".join(rng.choices(WORDS, k=20))
        answer = " ".join(rng.choices(WORDS, k=num_words))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"id": str(num_words), "image": "noise.png", "conversations": turns}

    (directory / "equal.json").write_text(json.dumps([record(2000) for _ in range(32)]))
    (directory / "varied.json").write_text(json.dumps([record(20 + 6 * n) for n in range(32)]))


def command_line(case: Case, folder: Path, device: str, *, model: str | None = None) -> list[str]:
    """The flags of a run, as for `train.py`."""
    data = "varied.json" if case.varied_lengths else "equal.json"
    values = BASE | case.flags
    values |= {
        "model_name_or_path": folder / (model or case.model),
        "data_path": folder / "data" / data,
        "image_folder": folder / "data",
        "output_dir": folder / "output",
    }
    if device == "cpu":
        values["use_cpu"] = True
    if case.zero is not None:
        file = folder / f"zero{case.zero['zero_optimization']['stage']}.json"
        file.write_text(json.dumps(case.zero))
        values["deepspeed"] = file
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def predict(case: Case, argv: list[str]) -> dict:
    """What `llava-ft plan` says."""
    from llava_ft.args import parse_args
    from llava_ft.planning.plan import make_plan
    from llava_ft.planning.request import plan_machine

    args = parse_args(argv)
    plan = make_plan(args, plan_machine(args.inherited, gpus=case.ranks, nodes=1, gpu_memory="1000GiB"))
    memory = plan.memory
    return {
        "bytes": memory.tensors,
        "peak": memory.peak_phase,
        "components": dict(memory.components[memory.peak_phase]),
    }


def child(argv: list[str], warm_up: list[str]) -> None:
    """Train twice in this process, a tiny model and then the one in question, and print the peak of the second."""
    import torch

    from llava_ft.args import parse_args
    from llava_ft.training.distributed import join_ranks, leave_ranks
    from llava_ft.training.run import prepare_run

    args = parse_args(warm_up)
    join_ranks(args)
    run = prepare_run(args)
    run.trainer.train()
    run.stop.release()
    del run, args
    gc.collect()
    on_gpu = torch.cuda.is_available() and "--use_cpu" not in argv
    baseline = 0 if on_gpu else resident("VmRSS")
    args = parse_args(argv)
    watch = join_ranks(args)
    run = prepare_run(args)
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    run.trainer.train()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - baseline
    if int(os.environ.get("RANK") or 0) == 0:
        print(json.dumps({"bytes": peak, "baseline": baseline}))
    leave_ranks(watch)


def resident(field_name: str) -> int:
    """A figure of this process's memory in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field_name))
    return int(line.split()[1]) * 1024


def measure(case: Case, argv: list[str], warm_up: list[str]) -> dict:
    """Run a case in processes of its own; memory that is given back leaves the process at once."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    script = [str(Path(__file__).resolve()), "--child", json.dumps({"argv": argv, "warm_up": warm_up})]
    command = [sys.executable, *script]
    if case.ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
        command += script
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{") and '"baseline"' in line]
    if done.returncode or not lines:
        return {"error": (done.stderr or done.stdout)[-2000:]}
    return json.loads(lines[-1])


def compare(name: str, case: Case, folder: Path, device: str) -> dict:
    """Predict and measure one case."""
    for model in ("tiny", case.model):
        if not (folder / model).is_dir():
            make_model(folder / model, model)
    argv = command_line(case, folder, device)
    predicted = predict(case, argv)
    warm_up = command_line(case, folder, device, model="tiny")
    measured = measure(case, argv, warm_up)
    if "error" in measured and case.ranks > 1:  # a run of two ranks was seen to abort once in some sixty
        print(f"{name}: measured again after an abort", file=sys.stderr)
        measured = measure(case, argv, warm_up)
    row = {"name": name, "device": device, "model": case.model, "ranks": case.ranks, "predicted": predicted}
    row["measured"] = measured
    if "bytes" in measured:
        row["ratio"] = round(predicted["bytes"] / measured["bytes"], 3)
    return row


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| run | device | ranks | predicted MiB | measured MiB | ratio | peak in |", "| --- |" + " --- |" * 6]
    for row in rows:
        predicted = row["predicted"]
        measured = f"{row['measured']['bytes'] / MIB:,.0f}" if "ratio" in row else "failed"
        lines.append(
            f"| {row['name']} ({row['model']}) | {row['device']} | {row['ranks']} | {predicted['bytes'] / MIB:,.0f} | "
            f"{measured} | {row.get('ratio', '')} | {predicted['peak']} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Compare the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases; all when absent")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--output", type=Path, help="folder for plan_memory.json and plan_memory.md")
    parser.add_argument(
        "--add", action="store_true", help="keep the files' rows of other cases, and write each at once"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    if options.child:
        child(**json.loads(options.child))
        return 0
    if options.list:
        print("\n".join(CASES))
        return 0
    import torch

    names = options.names or list(CASES)
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; --list shows the names")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: list[dict] = []
    about = where()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder / "data")
        for name in names:
            for device in devices:
                if device == "cuda" and CASES[name].ranks > torch.cuda.device_count():
                    continue
                rows.append(compare(name, CASES[name], folder, device))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
                if "error" in rows[-1]["measured"]:
                    print(rows[-1]["measured"]["error"], file=sys.stderr)
                if options.output and options.add:
                    write_results(options.output, *with_earlier(options.output, rows, about))
    if options.output and not options.add:
        write_results(options.output, rows, about)
    return 0 if all("ratio" in row for row in rows) else 1


def with_earlier(folder: Path, rows: list[dict], about: dict) -> tuple[list[dict], dict]:
    """Put rows among those that are in the folder's file, with the commit at which each was measured."""
    earlier = json.loads((folder / "plan_memory.json").read_text())
    merged = {(row["name"], row["device"]): row for row in [*earlier["rows"], *rows]}
    order = list(CASES)
    again = earlier["where"].get("measured_again", {}) | {row["name"]: about["commit"] for row in rows}
    where_all = earlier["where"] | {"measured_again": again}
    return sorted(merged.values(), key=lambda row: (order.index(row["name"]), row["device"])), where_all


def write_results(folder: Path, rows: list[dict], about: dict) -> None:
    """Write the rows with what they were measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan_memory.json").write_text(json.dumps({"where": about, "rows": rows}, indent=1) + "\n")
    named = ", ".join(f"{key} {value}" for key, value in about.items() if value and key != "measured_again")
    later: dict[str, list[str]] = {}
    for name, commit in about.get("measured_again", {}).items():
        later.setdefault(commit, []).append(name)
    notes = [f"Measured at commit {commit[:12]}: {'; '.join(names)}." for commit, names in later.items()]
    paragraphs = [f"`python benchmarks/plan_memory.py`; {named}.", *notes, table(rows)]
    text = "\n\n".join(["# Predicted and measured peak memory", *paragraphs]) + "\n"
    (folder / "plan_memory.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
