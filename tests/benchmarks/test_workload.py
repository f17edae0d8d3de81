"""What the benchmark of a step trains on, and what it counts."""

import pytest
import torch
from measure import flops_of, model_flops
from workload import LLAMA_7B, PRESETS, draw_samples, find_preset, make_batches

from llava_ft.models.families.published import PUBLISHED


def test_lengths_are_like_those_of_the_mixture():
    samples = draw_samples(PRESETS["h200_7b"], 4000)
    lengths = torch.tensor([float(len(sample.input_ids)) for sample in samples])
    assert 740 < lengths.mean() < 790
    assert sum(not sample.has_image for sample in samples) == 240
    with_image = next(sample for sample in samples if sample.has_image)
    assert int((with_image.input_ids == -200).sum()) == 576
    assert all(len(sample.input_ids) == len(sample.labels) <= 2048 for sample in samples)
    assert all(bool((sample.labels >= 0).any()) for sample in samples)


def test_batches_are_the_same_each_time_and_of_one_modality():
    preset = find_preset("cpu_small", dry_run=True)
    first, second = make_batches(preset, 8), make_batches(preset, 8)
    assert [[s.number for s in batch] for batch in first] == [[s.number for s in batch] for batch in second]
    assert len(first) == 8
    assert sum(len({sample.has_image for sample in batch}) == 2 for batch in first) <= 1


def test_shapes_are_those_that_are_planned_with():
    assert LLAMA_7B.items() >= {k: v for k, v in PUBLISHED["lmsys/vicuna-7b-v1.5"].items() if "size" in k}.items()


@pytest.mark.parametrize(("name", "tflop"), [("h200_7b", 22.2), ("h200_13b", 42.1)])
def test_flops_of_a_sample_of_763_tokens(name, tflop):
    """The figure for 7B counts the last layer at every position, 2% more; the count for 13B was done by hand."""
    preset = PRESETS[name]
    width, inner, layers = (preset.language[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    per_layer = 4 * width * width + 3 * width * inner
    adapters = 128 * (4 * 2 * width + 3 * (width + inner))
    by_hand = 763 * layers * (4 * per_layer + 6 * adapters) + layers * 12 * 763 * 764 / 2 * width
    by_hand += 112 * 4 * width * 32000 + 2 * 577 * 23 * 12 * 1024**2 + 23 * 4 * 577**2 * 1024
    by_hand += 576 * (4 * 1024 + 6 * width) * width
    assert by_hand / 1e12 == pytest.approx(tflop, rel=0.01)
    each = flops_of(preset, with_tower=True)
    counted = 763 * each.per_position + 112 * each.per_supervised + 763 * 764 / 2 * each.per_pair + each.per_tile
    behind = (width * width + 3 * width * inner) * 4 + 6 * 128 * (2 * width + 3 * (width + inner))
    assert counted == pytest.approx(by_hand - (763 - 112) * behind, rel=0.003)


def test_a_cached_tower_is_not_counted():
    preset = find_preset("cpu_small", dry_run=True)
    samples = draw_samples(preset, 8)
    with_tower, without = (model_flops(preset, samples, with_tower=runs) for runs in (True, False))
    assert 0 < without < with_tower
