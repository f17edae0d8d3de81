"""Holding the language model's linear layers in 4 or 8 bits while adapters or the projector are trained.

Source: QLoRA (arXiv:2305.14314) for 4 bits, LLM.int8() (arXiv:2208.07339) for 8, both through bitsandbytes. What is
notable: exactly the decoder's linear layers are quantised, which is checked after loading; each weight is quantised as
it is read, from its values on disk, so the 16-bit model is never in memory and the quantised weights depend on the
files and on `Quantization` alone, not on the compute dtype.

Packed values are stored as bytes (bitsandbytes' `quant_storage` uint8). Storing them as floating-point numbers serves
sharding only, and a conversion of the model's dtype, as DeepSpeed does it, would destroy them.

Rejected: PEFT's `prepare_model_for_kbit_training`, which converts every other weight of the model to float32. Norms,
embeddings and head stay in the compute dtype, as in a LoRA run; what is trained is float32 by `TuningPlan`.
"""

import ctypes
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from llava_ft.errors import RunError, UserError
from llava_ft.models.parts import language_model_linears

OUTLIER_THRESHOLD = 6.0
"""LLM.int8(): input columns with a value above it are multiplied in the compute dtype, not as integers."""

_QUANTIZED_PARAMETERS = ("Params4bit", "Int8Params")


@dataclass(frozen=True)
class Quantization:
    """How the language model's linear layers are held."""

    bits: Literal[4, 8]
    quant_type: Literal["nf4", "fp4"] = "nf4"  # of 4-bit values; nf4 is for normally distributed weights
    double_quant: bool = True  # with 4 bits, whether the scales of the blocks are quantised as well

    @classmethod
    def from_flags(cls, bits: int, quant_type: Literal["nf4", "fp4"], double_quant: bool) -> "Quantization | None":
        """Settle the quantisation from the original's flags; None for 16 bits."""
        if bits == 16:
            return None
        return cls(8) if bits == 8 else cls(4, quant_type, double_quant)

    def __str__(self) -> str:
        """Return the data type as the table of what is trained shows it."""
        if self.bits == 8:
            return "int8"
        return self.quant_type + (" (double-quantised)" if self.double_quant else "")

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what a weight is worth after being quantised, float32."""
        functional = _bitsandbytes().functional
        if self.bits == 8:
            values, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            return functional.int8_vectorwise_dequant(values, scales)
        packed, state = self._pack(weight)
        state.dtype = torch.float32
        return functional.dequantize_4bit(packed, state)

    def _pack(self, weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            weight = weight.float()
        return _bitsandbytes().functional.quantize_4bit(
            weight, compress_statistics=self.double_quant, quant_type=self.quant_type, quant_storage=torch.uint8
        )


def _bitsandbytes() -> Any:
    """Import bitsandbytes, untyped: its annotations leave out what it exports."""
    import bitsandbytes

    return bitsandbytes


def check_quantization(quantization: Quantization | None, *, zero_stage: int = 0) -> None:
    """Refuse a quantised run that could not start, before any weight is read.

    Args:
        quantization: The quantisation asked for.
        zero_stage: DeepSpeed's ZeRO stage; 0 without DeepSpeed.

    Raises:
        UserError: bitsandbytes is not installed, or the parameters would be divided among ranks.
    """
    if quantization is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"bits={quantization.bits}: quantised weights need bitsandbytes, which is not installed. Install it with "
            "pip install llava-ft[qlora], or use bits=16."
        )
    if zero_stage == 3:
        raise UserError(
            f"bits={quantization.bits} does not work with ZeRO stage 3: DeepSpeed divides every weight among the ranks "
            "and does not put packed values together correctly again, so that losses are wrong without an error. Use "
            "stage 2 (--deepspeed zero2.json), where each rank holds the quantised weights whole, no DeepSpeed, or "
            "bits=16."
        )


def quantize_linears(
    model: nn.Module, quantization: Quantization, compute_dtype_of: Callable[[str], torch.dtype]
) -> None:
    """Replace the decoder's linear layers by quantised ones that have no memory yet.

    Args:
        model: The model, its parameters on the meta device.
        quantization: How they are held.
        compute_dtype_of: The dtype in which the product with a weight is computed, by the weight's name.
    """
    for name in language_model_linears(model):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = _empty_layer(linear, quantization, compute_dtype_of(f"{name}.weight"))
        model.set_submodule(name, layer.requires_grad_(False))
    # PEFT chooses its layers by these, and Trainer leaves out DataParallel. Those by which transformers marks what its
    # own from_pretrained has quantised are not set: Trainer takes such a model only with adapters, but the projector
    # can be trained on it alone.
    marker = "is_loaded_in_8bit" if quantization.bits == 8 else "is_loaded_in_4bit"
    setattr(model, marker, True)


def _empty_layer(linear: nn.Linear, quantization: Quantization, compute_dtype: torch.dtype) -> nn.Linear:
    bnb = _bitsandbytes()
    sizes: dict[str, Any] = {
        "input_features": linear.in_features,
        "output_features": linear.out_features,
        "bias": linear.bias is not None,
        "device": "meta",
    }
    if quantization.bits == 8:
        return bnb.nn.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD)
    layer = bnb.nn.Linear4bit(
        **sizes,
        compute_dtype=compute_dtype,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.quant_type,
        quant_storage=torch.uint8,
    )
    # On processors with AVX512-BF16 an evaluation would repack the weights for a kernel that has no gradient: training
    # after it would go on without one, silently, and with scales rounded to bfloat16.
    layer.support_avx512bf16_for_cpu = False
    return layer


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a layer that `quantize_linears` made, with or without its values."""
    return type(module._parameters.get("weight")).__name__ in _QUANTIZED_PARAMETERS


def set_quantized_weight(layer: nn.Module, value: torch.Tensor) -> int:
    """Quantise a weight into its layer.

    Args:
        layer: A layer that `quantize_linears` made.
        value: The weight, `(out, in)`, floating point, on the device where it is to stay.

    Returns:
        The bytes it takes in memory.
    """
    bnb = _bitsandbytes()
    if value.device.type == "cpu":
        return_freed_memory()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        data, scales, _ = bnb.functional.int8_vectorwise_quant(value.to(torch.float16))
        layer.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scales)
        return size_in_memory(layer.weight)[1]
    assert isinstance(layer, bnb.nn.Linear4bit)
    made: Any = layer.weight
    packed, state = Quantization(4, made.quant_type, made.compress_statistics)._pack(value)
    state.dtype = layer.compute_dtype
    layer.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=made.compress_statistics,
        quant_type=made.quant_type,
        quant_storage=made.quant_storage,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    return size_in_memory(layer.weight)[1]


def return_freed_memory() -> None:
    """Give memory that was freed back to the system.

    Quantising a weight, or dividing it among ranks, takes several times its size for a moment, and leaves a small part
    that stays. glibc keeps what was freed around such parts: without this call a model loaded in 4 bits takes as much
    as in 16.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def size_in_memory(parameter: nn.Parameter) -> tuple[int, int]:
    """Return the number of values that a parameter stands for, and the bytes it takes with its scales."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        scales = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
        return math.prod(state.shape), parameter.nbytes + sum(tensor.nbytes for tensor in scales)
    if type(parameter).__name__ == "Int8Params":
        return parameter.numel(), parameter.nbytes + torch.float32.itemsize * parameter.shape[0]
    num_values = int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor behind
    return num_values, num_values * parameter.element_size()


def dtype_name(parameter: nn.Parameter) -> str:
    """Return the data type of a parameter for people: `bfloat16`, `int8`, `nf4 (double-quantised)`."""
    if type(parameter).__name__ == "Params4bit":
        settings: Any = parameter
        return str(Quantization(4, settings.quant_type, settings.compress_statistics))
    return str(parameter.dtype).removeprefix("torch.")


def check_quantized(model: nn.Module, quantization: Quantization | None) -> None:
    """Check that the decoder's linear layers are quantised, all of them and nothing else.

    Raises:
        RunError: They are not.
    """
    wanted = set(language_model_linears(model)) if quantization is not None else set[str]()
    kind = str(quantization)
    found, others = set[str](), set[str]()
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        is_packed = not parameter.is_floating_point()
        if module_name not in wanted:
            others |= {module_name} if is_packed or is_quantized(model.get_submodule(module_name)) else set()
        elif leaf == "weight" and is_packed and dtype_name(parameter) == kind:
            found.add(module_name)
    if wanted - found or others:
        problems = [
            f"{', '.join(sorted(names)[:4])} {what}"
            for names, what in ((wanted - found, f"should be {kind} but are not"), (others, "are quantised"))
            if names
        ]
        raise RunError(
            f"The language model's linear layers, and they alone, should be quantised: {'; '.join(problems)}. "
            "Does the installed bitsandbytes fit? The version tested is in constraints.txt; bits=16 needs none."
        )
