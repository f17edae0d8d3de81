"""Export to llama.cpp: a GGUF file with the language model, and one with vision tower and projector ("mmproj").

The files are written tensor by tensor and read back: each tensor must be the source's, rounded once, and each key what
the configuration says. Memory holds a tensor or two, whatever the model's size.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.shard_files import check_space
from llava_ft.conversation import Template, TemplateStyle, get_template
from llava_ft.convert.chat_template import chat_template
from llava_ft.convert.gguf_file import (
    Field,
    Fields,
    GgufContent,
    import_gguf,
    round_once,
    write_gguf,
)
from llava_ft.convert.gguf_metadata import (
    check_dtype,
    check_expressible,
    check_image_settings,
    differences,
    language_fields,
    vision_fields,
)
from llava_ft.convert.gguf_read import GgufWeights
from llava_ft.convert.gguf_tensors import DTYPES, File, GgufTensor, file_tensors, plan_tensors
from llava_ft.convert.gguf_vocabulary import check_ids, read_vocabulary, vocabulary_fields
from llava_ft.convert.options import ExportOptions
from llava_ft.convert.proof import ConversionReport, prove_tensors
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.errors import RunError, UserError

logger = logging.getLogger(__name__)

ARCHITECTURES: dict[File, str] = {"language": "llama", "vision": "clip"}


@dataclass(frozen=True)
class GgufPlan:
    """An export, settled before any weight is read.

    Attributes:
        tensors: Every tensor of both files.
        fields: What each file says about the model.
        names: Name of each file.
        notes: What a user of the files should know.
    """

    tensors: list[GgufTensor]
    fields: dict[File, Fields]
    names: dict[File, str]
    notes: list[str]


def export_gguf(whole: FullModel, target: Path, options: ExportOptions, report: ConversionReport) -> None:
    """Write a model as llama.cpp reads it, and compare the files with the model.

    Args:
        whole: The model.
        target: An existing directory; the files are written into it.
        options: `dtype` is float32, float16 or bfloat16. Files are not split, so `max_shard_bytes` has no effect.
        report: Gets what is written and the proof of it, without the comparison of logits.

    Raises:
        UserError: llama.cpp cannot run such a model, or the request asks for what GGUF has not.
        RunError: A file does not hold what it should.
    """
    plan = plan_export(whole, options)
    for note in plan.notes:
        logger.warning("GGUF: %s.", note)
    report.notes += plan.notes
    _write(whole, target, plan, report)
    _verify(whole, target, plan, report)


def plan_export(whole: FullModel, options: ExportOptions) -> GgufPlan:
    """Settle an export: refuse what GGUF or llama.cpp cannot hold, before weights are read.

    Raises:
        UserError: Something cannot be exported.
    """
    if options.adapter_only:
        raise UserError(
            "--adapter-only has no GGUF form here: a GGUF file holds the whole model. Leave the flag out, or export "
            "the adapter with --format hf --adapter-only and convert it with llama.cpp's convert_lora_to_gguf.py."
        )
    config = whole.config
    dtype = options.dtype or whole.dtype
    check_dtype(dtype)
    check_expressible(config)
    import_gguf()
    template = get_template(config.conversation_template or "v1")
    vocabulary = read_vocabulary(whole.tokenizer, whole.shapes["model.embed_tokens.weight"][0])
    check_ids(vocabulary, whole.tokenizer)
    name = model_name(whole.directory.path)
    template_text = None
    if template.style is not TemplateStyle.PLAIN:
        template_text = chat_template(template, mm_use_im_start_end=config.mm_use_im_start_end)
    fields: dict[File, Fields] = {
        "language": language_fields(config, name, dtype) | vocabulary_fields(vocabulary, whole.tokenizer, template_text)
    }
    names: dict[File, str] = {"language": f"{name}-{DTYPES[dtype]}.gguf"}
    if whole.base.vision_directory is not None:
        settings = ImageProcessorSettings.from_pretrained(whole.base.vision_directory)
        check_image_settings(settings)
        fields["vision"] = vision_fields(config, settings, name, dtype)
        names["vision"] = f"mmproj-{names['language']}"
    return GgufPlan(
        tensors=plan_tensors(whole.shapes, config, dtype),
        fields=fields,
        names=names,
        notes=[*differences(config), *_template_notes(template, whole)],
    )


def model_name(path: Path) -> str:
    """Name a model after its directory, and a checkpoint after the run's directory as well."""
    path = path.resolve()
    name = f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
    return "-".join(name.split()) or "model"


def _template_notes(template: Template, whole: FullModel) -> list[str]:
    """Say in what llama.cpp writes or ends a conversation otherwise than the model was trained."""
    if template.style is TemplateStyle.PLAIN:
        return ["the model was trained with template plain, which has no turns: the file holds no chat template"]
    notes: list[str] = []
    if whole.config.conversation_template is None:
        notes.append(f"the model does not name its template: the chat template is that of {template.name}")
    if template.stop != "</s>":
        notes.append(f"answers in template {template.name} end with {template.stop!r}: give llama.cpp that stop text")
    elif not getattr(whole.tokenizer, "legacy", True):
        notes.append(
            "from the second question on llama.cpp puts a blank behind </s>, which this tokenizer (legacy=false) does "
            "not"
        )
    return notes


def _write(whole: FullModel, target: Path, plan: GgufPlan, report: ConversionReport) -> None:
    check_space(target, sum(tensor.num_bytes for tensor in plan.tensors))

    def value_of(tensor: GgufTensor) -> torch.Tensor:
        found = whole.tensor(tensor.native, torch.float32)
        rounded = round_once(found.value, tensor)
        report.count(replace(found, value=rounded))
        return rounded

    for file, name in plan.names.items():
        tensors = file_tensors(plan.tensors, file)
        write_gguf(target / name, ARCHITECTURES[file], plan.fields[file], tensors, value_of)


def _verify(whole: FullModel, target: Path, plan: GgufPlan, report: ConversionReport) -> None:
    """Read both files back and compare them with the files of the model, tensor by tensor and key by key."""
    files: dict[File, GgufContent] = {file: GgufContent(target / name) for file, name in plan.names.items()}
    for file, content in files.items():
        path = target / plan.names[file]
        expected_fields = {"general.architecture": Field("STRING", ARCHITECTURES[file]), **plan.fields[file]}
        for key, field in expected_fields.items():
            if not _is_same(content.fields.get(key), field):
                raise RunError(f"{path} says {key} = {content.fields.get(key)!r}, and not {field.value!r}.")
        written = {(name, content.shape(name), content.dtype(name)) for name in content.names}
        expected = {(tensor.name, tensor.shape, tensor.dtype) for tensor in file_tensors(plan.tensors, file)}
        if written != expected:
            odd = sorted(name for name, _, _ in written ^ expected)
            raise RunError(f"{path} does not hold the tensors it should: {', '.join(odd[:4])}. Nothing was kept.")
    prove_tensors(report, whole, GgufWeights(target, files, plan.tensors, whole), with_tower=True)


def _is_same(found: object, field: Field) -> bool:
    kind = field.element or field.kind
    if kind == "FLOAT32" and found is not None:
        return np.array_equal(np.float32(found), np.float32(field.value))  # pyright: ignore[reportArgumentType]
    return found == field.value
