"""What is compared in the benchmark of a step, and running one of them in this process.

All run in transformers' `Trainer` with the same settings, so that what differs is the model's work.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))


@dataclass(frozen=True)
class Variant:
    """One way to compute the same steps.

    Attributes:
        name: For the command line.
        label: For the table.
        program: `llava_ft`, `original` or `transformers`.
        supervised_loss: Output layer and loss at supervised positions, in chunks; else float32 logits everywhere.
        last_layer: The last layer behind its attention at supervised positions only.
        joined: Samples joined to one row, attention within each; else padded.
        fast_lora: The program's own arithmetic for adapters; else PEFT's.
        cached: Features of the tower from a cache.
    """

    name: str
    label: str
    program: str = "llava_ft"
    supervised_loss: bool = False
    last_layer: bool = False
    joined: bool = False
    fast_lora: bool = False
    cached: bool = False


_STEPS = (
    ("plain", "padded, all logits, PEFT's LoRA", {}),
    ("loss", "+ loss at supervised positions, in chunks", {"supervised_loss": True}),
    ("last_layer", "+ last layer where it is read", {"last_layer": True}),
    ("joined", "+ no padding, attention within samples", {"joined": True}),
    ("fast_lora", "+ own LoRA arithmetic", {"fast_lora": True}),
    ("cached", "+ cached image features", {"cached": True}),
)


def all_variants() -> list[Variant]:
    """The baselines, then the program with one switch after another on."""
    found = [
        Variant("original", "(a) computation of the original", "original"),
        Variant("transformers", "(b) transformers' LLaVA, Trainer, PEFT", "transformers"),
    ]
    current = Variant("", "")
    for name, label, switches in _STEPS:
        current = replace(current, name=name, label=label, **switches)
        found.append(current)
    return found


def build_model(variant: Variant, preset: Any) -> Any:
    """The model of a variant, ready to train."""
    import torch
    from models import build_native, randomize_adapters

    if variant.program == "transformers":
        from baselines.transformers_trainer import build

        return build(preset)
    from llava_ft.models import attention_by_sample
    from llava_ft.tuning.lora import add_lora

    attention_by_sample.register()
    native = build_native(preset, attention_by_sample.NAME if variant.joined else "sdpa")
    if not variant.last_layer:
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

        native.model.layers[-1].__class__ = LlamaDecoderLayer
        native.model.layers[-1].self_attn.__class__ = LlamaAttention
    native._tower.one_at_a_time = preset.device == "cpu" and variant.program == "llava_ft"
    model = add_lora(native, r=preset.lora_r, alpha=preset.lora_alpha, dropout=0.0, fast=variant.fast_lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "mm_projector" in name)
    randomize_adapters(model)
    torch.manual_seed(0)
    return model


def loss_function(variant: Variant) -> Callable[..., Any]:
    """The loss of a batch: `(model, batch, num_items) -> loss`."""
    if variant.program == "original":
        from baselines.original import loss_of

        return lambda model, batch, num_items: loss_of(model, batch)
    if variant.program == "llava_ft" and not variant.supervised_loss:
        return _loss_of_all_logits
    return lambda model, batch, num_items: model(**batch, num_items_in_batch=num_items).loss


def _loss_of_all_logits(model: Any, batch: dict[str, Any], num_items: Any) -> Any:
    import torch.nn.functional as F

    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / num_items


def collator(variant: Variant, preset: Any, features: dict[int, Any]) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """From samples to a batch."""
    import torch

    if variant.program == "transformers":
        from baselines.transformers_trainer import collate

        return lambda samples: collate(samples, preset)
    from llava_ft.data.collator import PackedCollator, PaddingCollator

    join = PackedCollator(0, flatten=True) if variant.joined else PaddingCollator(0)
    side = preset.vision["image_size"]

    def collate_native(samples: Sequence[Any]) -> dict[str, Any]:
        items = []
        for sample in samples:
            item = {"input_ids": sample.input_ids, "labels": sample.labels, "index": sample.number}
            if sample.has_image and sample.number in features:
                item["image_features"] = features[sample.number]
            elif sample.has_image:
                item["pixel_values"] = sample.pixel_values(side)
            items.append(item)
        batch = join([{"samples": items}] if variant.joined else items)
        for key in ("sample_indices", "num_tokens", "bad_samples"):
            batch.pop(key, None)
        return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}

    return collate_native


def run(name: str, preset_name: str, num_steps: int, gradient_file: str) -> dict[str, Any]:
    """Train with a variant in this process, and say what it took."""
    import torch
    from machine import where  # noqa: F401 - imported before memory is counted, as everything else
    from measure import Meter, matrix_product_rate
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import set_seed
    from workload import PRESETS, make_batches

    import llava_ft.data.collator
    import llava_ft.tuning.lora  # noqa: F401

    if name == "transformers":
        import baselines.transformers_trainer  # noqa: F401
    preset = PRESETS[preset_name]
    variant = next(variant for variant in all_variants() if variant.name == name)
    device = torch.device(preset.device)
    meter = Meter(device)
    batches = make_batches(preset, num_steps)
    model = build_model(variant, preset)
    if device.type == "cuda":  # quantising passes through weights that a run never holds
        torch.cuda.reset_peak_memory_stats()
    features = _encode(model, batches, preset) if variant.cached else {}
    collate, loss_of = collator(variant, preset, features), loss_function(variant)
    checked = _check(model, [batches[0], _smallest(batches)], collate, loss_of, preset)
    torch.save(checked, gradient_file)

    class BenchTrainer(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return list(range(len(self.train_dataset)))

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return loss_of(model, inputs, num_items_in_batch)

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            meter.start()

        def on_step_end(self, args, state, control, **kwargs):
            meter.stop()

    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=preset.batch_size,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            save_strategy="no",
            use_cpu=preset.device == "cpu",
            bf16=preset.dtype == torch.bfloat16,
            gradient_checkpointing=preset.gradient_checkpointing,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = BenchTrainer(
            model=model,
            args=arguments,
            train_dataset=[sample for batch in batches for sample in batch],
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.train()
    peak = meter.peak_bytes()
    rate = matrix_product_rate(device, preset.dtype, preset.language["hidden_size"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return asdict(variant) | {"seconds": meter.seconds, "peak": peak, "losses": losses, "product_rate": rate}


def _smallest(batches: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """The batch with fewest images, one without if there is."""
    return min(batches, key=lambda batch: (sum(sample.has_image for sample in batch), sum(map(_length, batch))))


def _length(sample: Any) -> int:
    return len(sample.input_ids)


def _encode(model: Any, batches: Sequence[Sequence[Any]], preset: Any) -> dict[int, Any]:
    """Features of all images, as a cache has them."""
    import torch

    native, side = model.get_base_model(), preset.vision["image_size"]
    with torch.no_grad():
        features = {
            sample.number: native._tower(sample.pixel_values(side).to(preset.device)).cpu()
            for batch in batches
            for sample in batch
            if sample.has_image
        }
    native.runs_tower = False
    return features


def _check(model: Any, batches: Sequence[Any], collate: Any, loss_of: Any, preset: Any) -> list[dict[str, Any]]:
    """Loss and gradients of single batches, by native name, before anything is trained."""
    import torch
    from models import canonical

    model.train()
    results = []
    for samples in batches:
        batch = {key: value.to(preset.device) for key, value in collate(samples).items()}
        num_items = (batch["labels"][:, 1:] >= 0).sum()
        with torch.autocast(preset.device, preset.dtype, enabled=preset.dtype != torch.float32):
            loss = loss_of(model, batch, num_items)
        loss.backward()
        gradients = {canonical(n): p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": loss.item(), "gradients": gradients})
        model.zero_grad()
    return results


if __name__ == "__main__":
    result = run(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    print("RESULT " + json.dumps(result))
