"""One variant of the benchmark of a step, run in this process.

All run in transformers' `Trainer` with the same settings, so that what differs is the model's work.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import Meter, matrix_product_rate
from models import build_native, canonical, is_trained, randomize_adapters
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed
from variants import ORIGINAL, TRANSFORMERS, Variant, all_variants
from workload import Preset, Sample, find_preset, make_batches

from llava_ft.args import ParsedArgs, parse_args
from llava_ft.data.collator import PackedCollator, PaddingCollator
from llava_ft.errors import UserError
from llava_ft.training.compile import compile_layers
from llava_ft.training.data_setup import length_multiple
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.recompute import Recomputation, recompute_activations

MOST_VALUES = 2**16
"""Values of a gradient that are compared; of larger ones every n-th."""

Loss = Callable[[Any, dict[str, Any], Any], torch.Tensor]
Collate = Callable[[Sequence[Sample]], dict[str, Any]]


def parsed_flags(variant: Variant, preset: Preset) -> ParsedArgs:
    """The variant as a run of the program would get it."""
    named = preset.flags | variant.flags
    return parse_args([text for name, value in named.items() for text in (f"--{name}", value)])


def build_model(variant: Variant, preset: Preset, args: ParsedArgs) -> Any:
    """The model of a variant, ready to train."""
    if variant.program == TRANSFORMERS:
        from baselines.transformers_trainer import build

        return build(preset)
    native = build_native(preset, args.attn_implementation)
    if variant.whole_last_layer or variant.program == ORIGINAL:
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

        native.model.layers[-1].__class__ = LlamaDecoderLayer
        native.model.layers[-1].self_attn.__class__ = LlamaAttention
    native._tower.one_at_a_time = preset.device == "cpu" and variant.program == "llava_ft"
    model: Any = native
    if preset.lora_r:
        model = add_lora(native, r=preset.lora_r, alpha=preset.lora_alpha, dropout=0.0, fast=args.flags.fast_lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, preset))
    randomize_adapters(model)
    return model


def loss_function(variant: Variant) -> Loss:
    """The loss of a batch: `(model, batch, num_items) -> loss`."""
    if variant.program == ORIGINAL:
        from baselines.original import loss_of

        return lambda model, batch, num_items: loss_of(model, batch)
    if variant.all_logits:
        return _loss_of_all_logits
    return lambda model, batch, num_items: model(**batch, num_items_in_batch=num_items).loss


def _loss_of_all_logits(model: Any, batch: dict[str, Any], num_items: Any) -> torch.Tensor:
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return losses / num_items


def collator(variant: Variant, preset: Preset, args: ParsedArgs, features: dict[int, torch.Tensor]) -> Collate:
    """From samples to a batch."""
    if variant.program == TRANSFORMERS:
        from baselines.transformers_trainer import collate

        return lambda samples: collate(samples, preset)
    is_joined, multiple = args.data.padding_free, length_multiple(args)
    join: PackedCollator | PaddingCollator
    if is_joined:
        join = PackedCollator(0, flatten=True, length_multiple=multiple)
    else:
        join = PaddingCollator(0, with_mask=variant.program == ORIGINAL, length_multiple=multiple)
    side = preset.vision["image_size"]

    def collate_native(samples: Sequence[Sample]) -> dict[str, Any]:
        items = []
        for sample in samples:
            item = {"input_ids": sample.input_ids, "labels": sample.labels, "index": sample.number}
            if sample.has_image and sample.number in features:
                item["image_features"] = features[sample.number]
            elif sample.has_image:
                item["pixel_values"] = sample.pixel_values(side)
            items.append(item)
        batch = join([{"samples": [item]} for item in items] if is_joined else items)
        for key in ("sample_indices", "num_tokens", "num_pairs", "bad_samples"):
            batch.pop(key, None)
        return batch

    return collate_native


class _BenchTrainer(Trainer):
    loss_of: Loss

    def _get_train_sampler(self, train_dataset=None):
        return list(range(len(self.train_dataset)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.loss_of(model, inputs, num_items_in_batch)


class _Clock(TrainerCallback):
    def __init__(self, meter: Meter):
        self.meter = meter

    def on_step_begin(self, args, state, control, **kwargs):
        self.meter.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.meter.stop()


def train(variant: Variant, preset: Preset, num_steps: int, gradient_file: Path) -> dict[str, Any]:
    """Train with a variant, and say what it took.

    Args:
        variant: How.
        preset: What.
        num_steps: Optimizer steps.
        gradient_file: Where loss and gradients of two batches before the first step go. Computing them also compiles
            what is to be compiled.
    """
    device = torch.device(preset.device)
    args = parsed_flags(variant, preset)
    if variant.program == TRANSFORMERS:
        import baselines.transformers_trainer  # noqa: F401 - imported before memory is counted, as everything else
    meter = Meter(device)
    batches = make_batches(preset, num_steps)
    model = build_model(variant, preset, args)
    torch.manual_seed(0)
    if device.type == "cuda":  # quantising passes through weights that a run never holds
        torch.cuda.reset_peak_memory_stats()
    features = _encode(model, batches, preset) if variant.cached else {}
    collate, loss_of = collator(variant, preset, args, features), loss_function(variant)
    prepare_layers(model, variant, preset, args)
    checked = _check(model, [batches[0], _smallest(batches)], collate, loss_of, preset)
    torch.save(checked, gradient_file)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _BenchTrainer(
            model=model,
            args=_trainer_arguments(folder, preset, num_steps),
            train_dataset=[sample for batch in batches for sample in batch],
            data_collator=collate,
            callbacks=[_Clock(meter)],
        )
        trainer.loss_of = loss_of
        trainer.train()
    peak = meter.peak_bytes()
    rate = matrix_product_rate(device, preset.dtype, preset.language["hidden_size"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return asdict(variant) | {"seconds": meter.seconds, "peak": peak, "losses": losses, "product_rate": rate}


def prepare_layers(model: Any, variant: Variant, preset: Preset, args: ParsedArgs) -> None:
    """Recompute and compile as the flags say; the baselines use transformers' checkpointing."""
    if variant.program != "llava_ft":
        if preset.recomputed != "none":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return
    flags, training = args.flags, args.training
    recomputation = Recomputation.of_run(
        flags.gradient_checkpointing,
        flags.gradient_checkpointing_every,
        offload=flags.activation_offload,
        is_compiled=training.torch_compile,
    )
    recompute_activations(model, recomputation)
    if training.torch_compile:
        compile_layers(model, backend=preset.compiler, mode=training.torch_compile_mode)


def _trainer_arguments(folder: str, preset: Preset, num_steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=num_steps,
        per_device_train_batch_size=preset.batch_size,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused" if preset.device == "cuda" else "adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        use_cpu=preset.device == "cpu",
        bf16=preset.dtype == torch.bfloat16,
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _smallest(batches: Sequence[Sequence[Sample]]) -> Sequence[Sample]:
    """The batch with fewest images, one without if there is."""
    return min(batches, key=lambda batch: (sum(s.has_image for s in batch), sum(len(s.input_ids) for s in batch)))


def _encode(model: Any, batches: Sequence[Sequence[Sample]], preset: Preset) -> dict[int, torch.Tensor]:
    """Features of all images, as a cache has them."""
    native = model.get_base_model() if preset.lora_r else model
    side = preset.vision["image_size"]
    with torch.no_grad():
        features = {
            sample.number: native._tower(sample.pixel_values(side).to(preset.device)).cpu()
            for batch in batches
            for sample in batch
            if sample.has_image
        }
    native.runs_tower = False
    return features


def _check(
    model: Any, batches: Sequence[Sequence[Sample]], collate: Collate, loss_of: Loss, preset: Preset
) -> list[dict[str, Any]]:
    """Loss and gradients of single batches, by native name, before anything is trained."""
    model.train()
    results = []
    for samples in batches:
        collated = collate(samples)
        batch = {k: v.to(preset.device) if isinstance(v, torch.Tensor) else v for k, v in collated.items()}
        num_items = (batch["labels"][:, 1:] >= 0).sum()
        with torch.autocast(preset.device, preset.dtype, enabled=preset.dtype != torch.float32):
            loss = loss_of(model, batch, num_items)
        loss.backward()
        gradients = {canonical(n): _some(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": loss.item(), "gradients": gradients})
        model.zero_grad()
    return results


def _some(gradient: torch.Tensor) -> torch.Tensor:
    values = gradient.flatten()
    return values[:: -(-len(values) // MOST_VALUES)].cpu().clone()


def main() -> None:
    """Run what a JSON object on the command line says, and print the result as another one."""
    wish = json.loads(sys.argv[1])
    preset = find_preset(wish["preset"], dry_run=wish["dry_run"])
    variant = next(variant for variant in all_variants(preset) if variant.name == wish["variant"])
    try:
        result = train(variant, preset, wish["num_steps"], Path(wish["gradients"]))
    except UserError as error:  # such as a kernel that is not installed
        result = {"missing": str(error)}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
