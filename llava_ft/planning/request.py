"""What is to be planned, in plain values: the run as its flags describe it, and the machine it is to run on."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers

from llava_ft.args.attention import AttentionMachine, choose_kernel, installed_kernels
from llava_ft.args.build import adapt_to_device
from llava_ft.args.deepspeed_file import check_deepspeed_config, read_deepspeed_config
from llava_ft.checkpoint.save import result_kind
from llava_ft.errors import UserError
from llava_ft.models.attention.kernels import fitting_kernel
from llava_ft.resolve import RunModel
from llava_ft.tuning.kernels import why_not_fast
from llava_ft.tuning.plan import TuningPlan
from llava_ft.tuning.quant import Quantization, check_quantization
from llava_ft.tuning.recompute import Recomputation

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(GiB|GB|G|MiB|MB|M)", re.IGNORECASE)
_BYTES = {"GIB": 2**30, "G": 2**30, "GB": 10**9, "MIB": 2**20, "M": 2**20, "MB": 10**6}

Tower = Literal["runs", "held", "absent"]
"""What a run does with its vision tower: encodes images with it, only holds it because it is to be saved, or does not
load it because a vision cache stands in its place."""


@dataclass(frozen=True)
class Machine:
    """Where the run is to take place."""

    device: Literal["cuda", "cpu"] = "cuda"
    gpus_per_node: int = 1  # ranks on each machine
    num_nodes: int = 1
    memory: int | None = None  # bytes that a rank has, if known
    memory_source: str = ""  # where that number is from, for the report

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.gpus_per_node * self.num_nodes

    @property
    def rank_name(self) -> str:
        """What a rank runs on, for people."""
        return "GPU" if self.device == "cuda" else "process"


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of the run: the arguments of `add_lora`."""

    r: int
    alpha: int
    dropout: float
    bias: Literal["none", "all", "lora_only"]
    leaf_names: tuple[str, ...] | None
    fast: bool = True


@dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed's settings as far as they decide memory; the defaults are DeepSpeed's own. Sizes count values."""

    stage: int = 0  # divided among the ranks: nothing (0), optimizer state (1), gradients too (2), weights too (3)
    offload_optimizer: bool = False  # master weights, optimizer state and gradients are in the host's memory
    offload_param: bool = False  # weights wait in the host's memory (stage 3)
    reduce_bucket_size: int = 500_000_000  # reduced at a time; such a buffer is there during the backward pass
    overlap_comm: bool = False  # reducing overlaps with the backward pass: a second buffer (stages 1 and 2)
    prefetch_bucket_size: int = 50_000_000  # gathered ahead of their use (stage 3)
    param_persistence_threshold: int = 100_000  # parameters with fewer stay whole on every rank (stage 3)
    max_live_parameters: int = 1_000_000_000  # no more is gathered ahead when so many are whole (stage 3)
    max_reuse_distance: int = 1_000_000_000  # a weight stays whole if it is used again within so many (stage 3)
    sub_group_size: int = 1_000_000_000  # updated at a time by the optimizer (stage 3)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], hidden_size: int) -> "ZeroSettings":
        """Read DeepSpeed's whole configuration; transformers fills in "auto" by the language model's width.

        Raises:
            UserError: A size is no number.
        """
        zero = config.get("zero_optimization") or {}
        automatic = {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }

        def is_offloaded(section: str) -> bool:
            return (zero.get(section) or {}).get("device", "none") not in (None, "none")

        def number(key: str) -> int:
            value = zero.get(key, getattr(cls, key.removeprefix("stage3_")))
            try:
                return automatic[key] if value == "auto" else int(value)
            except (KeyError, TypeError, ValueError):
                raise UserError(
                    f"zero_optimization.{key} of the DeepSpeed configuration is {value!r}. Allowed is a whole number "
                    f"of values{', or auto' if key in automatic else ''}."
                ) from None

        stage, overlap = int(zero.get("stage", 0)), zero.get("overlap_comm")
        return cls(
            stage=stage,
            offload_optimizer=is_offloaded("offload_optimizer"),
            offload_param=stage == 3 and is_offloaded("offload_param"),
            reduce_bucket_size=number("reduce_bucket_size"),
            overlap_comm=stage == 3 if overlap is None else bool(overlap),
            prefetch_bucket_size=number("stage3_prefetch_bucket_size"),
            param_persistence_threshold=number("stage3_param_persistence_threshold"),
            max_live_parameters=number("stage3_max_live_parameters"),
            max_reuse_distance=number("stage3_max_reuse_distance"),
            sub_group_size=number("sub_group_size"),
        )

    def __str__(self) -> str:
        """Return the name that people use, such as `ZeRO-3 with offload`."""
        return f"ZeRO-{self.stage}{' with offload' if self.offload_optimizer or self.offload_param else ''}"


@dataclass(frozen=True)
class PlanRequest:
    """A run to be planned."""

    machine: Machine
    tuning: TuningPlan
    lora: LoraSettings | None
    quantization: Quantization | None  # of the language model's linear layers; None for 16 bits
    compute_dtype: torch.dtype  # of frozen weights and of matrix products
    attention: str  # kernel of the language model
    recomputation: Recomputation
    batch_size: int  # samples of one rank in one forward pass
    accumulation: int  # forward passes of one optimizer step
    optimizer: str  # transformers' name
    zero: ZeroSettings | None  # None without DeepSpeed
    tower: Tower = "runs"
    max_steps: int = -1  # with a number below 1 `num_epochs` counts
    num_epochs: float = 1.0

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step on all ranks."""
        return self.batch_size * self.accumulation * self.machine.world_size

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels are those of a GPU."""
        return self.machine.device == "cuda"

    @property
    def keeps_little(self) -> bool:
        """Whether decoder layers compute by `kernels/lora_layer.py`, which recomputes by itself what costs little."""
        lora, bits = self.lora, self.quantization.bits if self.quantization else 16
        return lora is not None and lora.fast and lora.bias == "none" and bits != 8

    def dtype_of(self, name: str) -> torch.dtype:
        """Type of a parameter in memory: DeepSpeed converts all, and keeps master weights in its optimizer."""
        return self.tuning.dtype_of(name, self.compute_dtype) if self.zero is None else self.compute_dtype

    def changed(self, **changes: Any) -> "PlanRequest":
        """Return the request with some values replaced."""
        return dataclasses.replace(self, **changes)


def plan_request(run: RunModel, machine: Machine) -> PlanRequest:
    """Read the request from the run's flags; notes of what they come to are added to its notes.

    Raises:
        UserError: Such a run would be refused.
    """
    args, tuning = run.args, run.tuning
    flags, notes = args.flags, args.notes
    # Every training flag with its value or default, as the run would use it on that machine.
    fields = dataclasses.fields(transformers.TrainingArguments)
    wanted: dict[str, Any] = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    wanted |= {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags)}
    wanted |= dict(args.inherited)
    values, adapted = adapt_to_device(wanted, has_cuda=machine.device == "cuda", has_tf32=True)
    notes.extend(adapted)

    zero = None
    if values["deepspeed"]:
        config, source = read_deepspeed_config(values["deepspeed"], notes)
        notes.extend(check_deepspeed_config(config, source, values))
        zero = ZeroSettings.from_config(config, run.config.hidden_size)
    quantization = Quantization.from_flags(flags.bits, flags.quant_type, flags.double_quant)
    check_quantization(quantization, zero_stage=zero.stage if zero else 0)
    lora = None
    if flags.lora_enable:
        is_fast = flags.fast_lora and why_not_fast(run.config) is None
        leaf_names = tuple(flags.lora_target_modules) if flags.lora_target_modules else None
        lora = LoraSettings(flags.lora_r, flags.lora_alpha, flags.lora_dropout, flags.lora_bias, leaf_names, is_fast)
    is_compiled = bool(values["torch_compile"])
    if is_compiled:
        notes.append("Memory is planned as without torch_compile, which keeps less of a compiled layer.")
    # A kernel that is named counts as installed on that machine, others if they are here.
    wish, is_half = args.model.attn_implementation, bool(values["bf16"] or values["fp16"])
    kernels = AttentionMachine(machine.device == "cuda", is_half, installed=installed_kernels() | {wish})
    tower: Tower = "runs"
    if args.data.vision_cache is not None:
        tower = "held" if result_kind(tuning) == "full" and flags.save_vision_tower else "absent"
    return PlanRequest(
        machine=machine,
        tuning=tuning,
        lora=lora,
        quantization=quantization,
        compute_dtype=torch.bfloat16 if values["bf16"] else torch.float16 if values["fp16"] else torch.float32,
        attention=fitting_kernel(choose_kernel(wish, kernels, []), run.config, is_named=wish != "auto"),
        recomputation=Recomputation.of_run(
            flags.gradient_checkpointing,
            flags.gradient_checkpointing_every,
            offload=flags.activation_offload,
            is_compiled=is_compiled,
        ),
        batch_size=int(values["per_device_train_batch_size"]),
        accumulation=int(values["gradient_accumulation_steps"]),
        optimizer=str(values["optim"]),
        zero=zero,
        tower=tower,
        max_steps=int(values["max_steps"]),
        num_epochs=float(values["num_train_epochs"]),
    )


def plan_machine(inherited: Mapping[str, object], *, gpus: int | None, nodes: int, gpu_memory: str | None) -> Machine:
    """Settle where the run is to take place: what is asked for, else this machine's GPUs, else one GPU.

    Args:
        inherited: Given fields of `transformers.TrainingArguments`; with `use_cpu` the run is planned for a CPU.
        gpus: GPUs (with `use_cpu` processes) on each machine.
        nodes: Machines.
        gpu_memory: Memory of each GPU, such as `24GiB`.

    Raises:
        UserError: A number makes no sense.
    """
    for name, value in (("gpus", gpus), ("nodes", nodes)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}. Allowed are whole numbers from 1.")
    memory, source = (parse_memory(gpu_memory), "--gpu-memory") if gpu_memory else (None, "")
    if inherited.get("use_cpu"):
        if memory is None:
            import psutil

            memory, source = psutil.virtual_memory().total // (gpus or 1), "this machine's memory"
        return Machine("cpu", gpus or 1, nodes, memory, source)
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if memory is None and visible:
        properties = torch.cuda.get_device_properties(0)
        memory, source = properties.total_memory, f"{properties.name} in this machine"
    return Machine("cuda", gpus or visible or 1, nodes, memory, source)


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as `24GiB`, `80GB` or `24576MiB`.

    Raises:
        UserError: It is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match.group(1)) == 0:
        raise UserError(f"--gpu-memory is {text!r}. Allowed is a size with its unit, such as 24GiB, 80GB or 24576MiB.")
    return int(float(match.group(1)) * _BYTES[match.group(2).upper()])
