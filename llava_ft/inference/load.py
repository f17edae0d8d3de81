"""Loading any LLaVA model for use, by what its directory holds."""

import argparse
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from llava_ft.checkpoint.adapter import LoraAdapter, merged
from llava_ft.checkpoint.base_and_adapters import open_base_and_adapters
from llava_ft.checkpoint.blend import Adapters
from llava_ft.checkpoint.directory import identify, resolve_model_path
from llava_ft.checkpoint.model import ModelSpec, count_new_rows, load_base
from llava_ft.checkpoint.names import PEFT_PREFIX
from llava_ft.checkpoint.overrides import Force, force_from_flags
from llava_ft.checkpoint.quantized import quantization_in_training
from llava_ft.data.images import ImageTransform
from llava_ft.errors import UserError
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.tuning.lora import wrap_with_peft
from llava_ft.tuning.quant import Quantization, check_quantization

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "v1"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer."""

    tokenizer: PreTrainedTokenizerFast
    model: LlavaForCausalLM | PeftModel  # in evaluation mode
    image_transform: ImageTransform | None  # how an image becomes pixels; None for a text-only model
    template: str  # name of the conversation template it was trained with
    context_len: int  # longest sequence in tokens
    base: ModelSpec  # what it was made of

    @property
    def plain_model(self) -> LlavaForCausalLM:
        """The model without PEFT around it; adapters that lie beside its weights stay."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        assert isinstance(model, LlavaForCausalLM)
        return model


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    *,
    vision_tower: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    force: Force = False,
    load_8bit: bool = False,
    load_4bit: bool = False,
) -> tuple[PreTrainedTokenizerFast, LlavaForCausalLM, ImageTransform | None, int]:
    """Load a model for use, with an adapter added into the weights if there is one.

    With `load_4bit` or `load_8bit` the language model's linear layers are quantised, and an adapter stays beside them.

    Args:
        model_path: A LLaVA model, a LoRA directory or a projector directory; what it is, is read from its files.
        model_base: Base of an adapter or projector; when absent, the one that the directory names.
        vision_tower: The vision tower, if it is not where the model says.
        dtype: Type of the weights; bfloat16 on a GPU and float32 on a CPU when absent.
        device: Where the model is put; a GPU if there is one.
        attn_implementation: Attention of the language model.
        force: Pass over what speaks against putting these weights together: True for all that may be passed over,
            "base" for a base other than the one an adapter was trained on.
        load_8bit: Hold the language model's linear layers in 8 bits.
        load_4bit: Hold them in 4 bits; see `choose_quantization`.

    Returns:
        `(tokenizer, model, image_processor, context_len)`, as in original LLaVA.

    Raises:
        UserError: A file is missing, damaged, or does not fit the others; or 4 and 8 bits are both wanted.
    """
    if load_8bit and load_4bit:
        raise UserError("load_8bit and load_4bit exclude each other. Give one of the two.")
    bits: Literal[4, 8, 16] = 8 if load_8bit else 4 if load_4bit else 16
    loaded = load_model(
        model_path,
        model_base,
        vision_tower=vision_tower,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        force=force,
        quantization=choose_quantization(model_path, bits),
    )
    return loaded.tokenizer, loaded.plain_model, loaded.image_transform, loaded.context_len


def load_model(
    model_path: str,
    model_base: str | None = None,
    *,
    vision_tower: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    force: Force = False,
    adapter: Literal["added", "beside"] = "added",
    quantization: Quantization | None = None,
) -> LoadedModel:
    """Load a model for use; see `load_pretrained_model`.

    `added` puts an adapter's part into the weights, unless `quantization` packs them: the sum would be rounded once
    more. `beside` keeps it as a PEFT model.
    """
    shares = [(1.0, identify(resolve_model_path(model_path)))]
    base = open_base_and_adapters(shares, model_base, vision_tower=vision_tower, force=force)
    return load_base_and_adapters(
        base,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        adapter=adapter,
        quantization=quantization,
    )


def load_by_flags(
    options: argparse.Namespace, path: str, base: str | None, *, adapter: Literal["added", "beside"] = "added"
) -> LoadedModel:
    """Load one of the models that a command line of `generate` or `chat` names, with the flags that hold for all."""
    return load_model(
        path,
        base,
        vision_tower=options.vision_tower,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        device=options.device,
        force=force_from_flags(options.force, options.allow_base_mismatch),
        adapter=adapter,
        quantization=choose_quantization(path, options.bits),
    )


def load_base_and_adapters(
    base: ModelSpec,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    adapter: Literal["added", "beside"] = "added",
    quantization: Quantization | None = None,
) -> LoadedModel:
    """Load what was opened, once; see `load_model`."""
    check_quantization(quantization)
    on = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if on.type == "cuda" else torch.float32)
    with_lengths = [lora.path for _, lora in base.adapters if lora.magnitudes]
    if with_lengths and quantization is not None and quantization.bits == 8 and on.type == "cpu":
        raise UserError(
            f"{with_lengths[0]} was trained with DoRA, and beside weights in 8 bits PEFT loses their scales on a CPU "
            "(peft 0.21, bitsandbytes 0.50). Use 4 or 16 bits."
        )
    tokenizer = base.tokenizer
    num_new_rows = count_new_rows(base.config, tokenizer, base.directory.path)
    model, ledger = load_base(
        base,
        num_new_rows=num_new_rows,
        dtype_of=lambda name: dtype,
        device=on,
        attn_implementation=attn_implementation,
        quantization=quantization,
    )
    ledger.log()
    for name, rows in base.rows.items():
        weight = model.get_parameter(name)
        weight.data[-rows.shape[0] :] = rows.to(weight.dtype)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):  # also where the weight is packed
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    for _, lora in base.adapters:
        lora.check_shapes(shapes)
    result: LlavaForCausalLM | PeftModel = model
    if base.adapters and (adapter == "beside" or quantization is not None):
        result = _beside(model, base.adapters)
    else:
        for name in dict.fromkeys(name for _, lora in base.adapters for name in lora.changed):
            weight = parameters[name]
            changing = [(share, lora) for share, lora in base.adapters if name in lora.changed]
            weight.data = merged(name, weight.data.cpu(), changing, weight.dtype).to(weight.device)
    transform = None
    if base.vision_directory is not None:
        transform = ImageTransform.from_pretrained(base.vision_directory, geometry=base.config.image_geometry)
    return LoadedModel(
        tokenizer=tokenizer,
        model=result.eval(),
        image_transform=transform,
        template=base.config.conversation_template or DEFAULT_TEMPLATE,
        context_len=getattr(base.config, "tokenizer_model_max_length", None) or base.config.max_position_embeddings,
        base=base,
    )


def choose_quantization(model_path: str, bits: Literal[4, 8, 16]) -> Quantization | None:
    """Choose how a model's linear layers are held for use: as in its training if that was with so many bits.

    4 bits are otherwise nf4 with quantised scales, as in the original.
    """
    if bits == 16:
        return None
    path = resolve_model_path(model_path)
    in_training = quantization_in_training(path)
    return in_training if in_training is not None and in_training.bits == bits else Quantization(bits)


def _beside(model: LlavaForCausalLM, adapters: Adapters) -> PeftModel:
    """Put adapters beside the weights, each on exactly the modules it has matrices for; PEFT does the arithmetic."""
    names = ["default", *(f"adapter_{index}" for index in range(1, len(adapters)))]
    wrapped = wrap_with_peft(model, _peft_config(adapters[0][1]))
    for name, (_, adapter) in zip(names[1:], adapters[1:], strict=True):
        wrapped.add_adapter(name, _peft_config(adapter))
    lora_model = wrapped.base_model
    assert isinstance(lora_model, LoraModel)
    lora_model.set_adapter(names)
    parameters = dict(wrapped.named_parameters())
    for name, (share, adapter) in zip(names, adapters, strict=True):
        for weight, (a, b) in adapter.factors.items():
            module = weight.removesuffix(".weight")
            values = {f"lora_A.{name}.weight": a, f"lora_B.{name}.weight": b}
            if weight in adapter.magnitudes:
                values[f"lora_magnitude_vector.{name}.weight"] = adapter.magnitudes[weight]
            if f"{module}.bias" in adapter.biases:
                values[f"lora_B.{name}.bias"] = adapter.biases[f"{module}.bias"] / adapter.scales[weight]
            for leaf, value in values.items():
                parameters[f"{PEFT_PREFIX}{module}.{leaf}"].data.copy_(value)
            if share != 1.0:
                layer = wrapped.get_submodule(PEFT_PREFIX + module)
                assert isinstance(layer, LoraLayer)
                layer.scaling[name] *= share
    return wrapped


def _peft_config(adapter: LoraAdapter) -> LoraConfig:
    modules = [name.removesuffix(".weight") for name in adapter.factors]
    ranks = {name: adapter.factors[name + ".weight"][0].shape[0] for name in modules}
    return LoraConfig(
        r=max(ranks.values()),
        target_modules=modules,
        exclude_modules=None,
        rank_pattern={f"^{name}$": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}$": adapter.alphas[name + ".weight"] for name in modules},
        use_rslora=adapter.use_rslora,
        use_dora=bool(adapter.magnitudes),
        lora_bias=bool(adapter.biases),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
