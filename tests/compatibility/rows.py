"""The rows of the compatibility table: a layout each, and what is refused of it by design."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.compatibility.runs import OwnRun, hf, hf_adapter, peft_adapter
from tests.layouts import native
from tests.layouts.native import Checkpoint, Write


@dataclass(frozen=True)
class Refusal:
    """What cannot be done, by design.

    Attributes:
        message: What the refusal says, as a regular expression.
        why: The reason, for the page.
    """

    message: str
    why: str


@dataclass(frozen=True)
class Row:
    """A layout.

    Attributes:
        name: What the page calls it.
        write: Writes one.
        flags: Further flags of a run that starts from it.
        refused: What is refused, by column.
        own: The run that wrote it, if this program did; resuming then is resuming that run.
    """

    name: str
    write: Callable[[Path], Checkpoint]
    flags: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    own: OwnRun | None = None


WHOLE = {"merge": Refusal("nothing in it to merge", "It is a whole model: there is nothing in it to merge.")}
_LINEAR = "transformers' layout and llama.cpp hold no other projector than mlp2x_gelu."
LINEAR = {
    "export hf": Refusal("its projector is linear, and the layout knows mlp2x_gelu alone", _LINEAR),
    "export gguf": Refusal("its projector is linear, and llama.cpp's has two", _LINEAR),
}
_SCALES = "transformers' layout and llama.cpp see an image at one scale."
S2 = {
    "export hf": Refusal("its tower sees images at several scales", _SCALES),
    "export gguf": Refusal("it sees each image at several scales", _SCALES),
}
NO_PROJECTOR = Refusal(
    "the projector that was trained with it is missing",
    "The projector that was trained with it is not in it; `llava-ft consolidate` gets it out of DeepSpeed's files.",
)
COLUMNS = ("load", "train", "resume", "merge", "generate", "export hf", "export llava", "export gguf")


def whole(name: str, write: Write, refused: Mapping[str, Refusal] | None = None) -> Row:
    return Row(name, write, refused=WHOLE | dict(refused or {}))


def lora(name: str, write: Write, refused: Mapping[str, Refusal] | None = None, **flags: Any) -> Row:
    return Row(name, write, {"lora_r": 8, "lora_alpha": 16} | flags, refused or {})


def own(name: str, run: OwnRun, refused: Mapping[str, Refusal] | None = None) -> Row:
    return Row(name, run.write, refused=refused or {}, own=run)


ROWS = (
    whole("v1.5, safetensors, vision tower outside", native.v15),
    whole("v1.5, `.bin` shards with index, `mm_projector.bin` beside", native.v15_bin_shards),
    whole("v1, linear projector", native.v1_linear, LINEAR),
    whole("full fine-tune with the vision tower's weights", native.full_with_vision),
    whole("vocabulary with `<im_start>`, `<im_end>`", native.im_start_end),
    whole("1.6 anyres with `image_newline`", native.anyres),
    whole("S2", native.s2, S2),
    lora("LoRA, `adapter_model.bin`", native.lora_bin),
    lora("LoRA, `adapter_model.safetensors`", native.lora_safetensors),
    lora("LoRA, keys with `module.`, `model.model.`, `.default.`", native.lora_prefixed),
    lora("LoRA on v1, linear projector (0719-336px)", native.lora_v1_linear, LINEAR),
    lora("LoRA, vocabulary with `<im_start>`, `<im_end>`", native.lora_im_start_end),
    lora("LoRA, all in `adapter_model_all.bin`", native.lora_all_bin),
    lora(
        "LoRA, `checkpoint-N` of the original, without projector",
        native.lora_without_projector,
        dict.fromkeys(COLUMNS, NO_PROJECTOR),
    ),
    lora("rsLoRA", native.rslora, adapter_mode="merge_first"),
    lora("DoRA", native.dora, adapter_mode="merge_first"),
    Row("LoRA that PEFT made on a native model", peft_adapter(), {"adapter_mode": "merge_first"}),
    Row("projector, `mm_projector.bin`", native.projector),
    Row("projector with rows of `<im_start>`, `<im_end>`", native.projector_im_start_end),
    own("this program's `checkpoint-N`, LoRA", OwnRun("lora")),
    own("this program's `checkpoint-N`, QLoRA in 4 bits", OwnRun("lora", {"bits": 4})),
    own("this program's `checkpoint-N`, projector", OwnRun("projector")),
    own("this program's `checkpoint-N`, full", OwnRun("full"), WHOLE),
    whole("transformers' LLaVA, today's names", hf("llava", "modules", num_shards=2)),
    whole("transformers' LLaVA, as `save_pretrained` writes it", hf("llava", "today")),
    whole("transformers' LLaVA, the hub's names", hf("llava", "hub", num_shards=2)),
    whole("transformers' LLaVA-NeXT, the hub's names", hf("llava_next", "hub")),
    Row("LoRA on transformers' LLaVA, by PEFT", hf_adapter("attention"), {"adapter_mode": "merge_first"}),
    Row(
        "the same with the projector in `modules_to_save`",
        hf_adapter("projector beside"),
        {"adapter_mode": "merge_first"},
    ),
)
