"""The benchmark of a step: all variants compute the same, with the smallest model of each preset."""

import argparse
from dataclasses import replace

import pytest
import torch
from comparison import summarise
from report import page
from step import train
from variants import PLAIN, all_variants
from workload import PRESETS, find_preset

NUM_STEPS = 2
FLOAT32, BFLOAT16 = (2e-6, 1e-5), (0.02, 0.15)
"""Largest difference of a loss, and of a gradient to its norm; the second as far as bfloat16 is from float32."""


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "tolerance", "left_out"),
    [
        ("cpu_small", FLOAT32, "compiled"),
        pytest.param("cpu_small_r128", FLOAT32, "", marks=pytest.mark.slow),
        pytest.param("qlora_24gb", BFLOAT16, "compiled", marks=pytest.mark.slow),
        pytest.param("h200_7b_full", BFLOAT16, "compiled", marks=pytest.mark.slow),
    ],
)
def test_all_variants_train_the_same(name, tolerance, left_out, tmp_path):
    preset = find_preset(name, dry_run=True)
    runs = {
        variant.name: [train(variant, preset, NUM_STEPS, tmp_path / f"{variant.name}.pt")]
        for variant in all_variants(preset)
        if variant.name != left_out
    }
    result = summarise(runs, preset, NUM_STEPS, tmp_path)
    assert [row["name"] for row in result["rows"]][:3] == ["original", "transformers", PLAIN]
    for row in result["rows"]:
        assert row["loss_difference"] <= tolerance[0], row
        assert row["largest_loss_difference_of_a_step"] <= 2 * tolerance[0], row
        assert row["gradient_difference"] <= tolerance[1], row
        assert row["samples_per_second"] > 0
        assert row["speed_to_(b)"] > 0
    options = argparse.Namespace(steps=NUM_STEPS, rounds=1, variants=list(runs))
    text = page(preset, options, {"where": {"gpu": None, "cores": 2}} | result)
    assert text.count("\n| ") == len(runs) + 2
    assert "not measured" not in text


def test_a_failed_variant_is_a_row_that_says_why(tmp_path):
    preset = replace(find_preset("cpu_small", dry_run=True), num_steps=1)
    plain = next(variant for variant in all_variants(preset) if variant.name == PLAIN)
    runs = {PLAIN: [train(plain, preset, 1, tmp_path / "plain.pt")], "joined": [{"error": "CUDA out of | memory"}]}
    runs["cached"] = [{"missing": "no time was left"}]
    result = summarise(runs, preset, 1, tmp_path)
    assert [row.get("error") for row in result["rows"]] == [None, "CUDA out of | memory", None]
    text = page(preset, argparse.Namespace(steps=1, rounds=1, variants=list(runs)), {"where": {}} | result)
    assert "| not measured: CUDA out of / memory |" in text
    assert "| not measured: no time was left |" in text
    assert "--variants plain joined cached`" in text


def test_on_a_gpu_each_kernel_and_each_way_to_recompute_has_a_row():
    names = {name: [variant.name for variant in all_variants(preset)] for name, preset in PRESETS.items()}
    assert {"varlen", "flash_attention_3", "offloaded", "every_2", "selective", "full"} <= set(names["h200_7b"])
    assert {"none", "selective"} <= set(names["qlora_24gb"])
    assert "full" not in names["qlora_24gb"]
    assert "fast_lora" not in names["h200_7b_full"]
    assert names["cpu_small"] == names["cpu_small_r128"]
    assert not {"varlen", "offloaded"} & set(names["cpu_small"])


def test_the_flags_of_a_preset_are_those_of_a_run():
    from step import parsed_flags

    preset = PRESETS["cpu_small_r128"]
    args = parsed_flags(all_variants(preset)[-1], preset)
    assert (args.flags.lora_r, args.flags.lora_alpha, args.data.padding_free) == (128, 256, True)
    assert args.flags.gradient_checkpointing == "full"
    assert args.attn_implementation == "sdpa"
    assert torch.float32 == preset.dtype
