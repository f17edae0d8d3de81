"""Living storage is counted once, by label and phase, until it dies."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_ft.planning.tracker import MemoryTracker

KIB = 1024


def block(num_kib: int) -> torch.Tensor:
    return torch.empty(num_kib * KIB, dtype=torch.uint8)


class TestMemoryTracker:
    def test_what_died_is_taken_off_and_the_peak_stays(self):
        with MemoryTracker() as tracker:
            first = block(4)
            second = block(8)
            del first
            assert tracker.now == 8 * KIB
            del second
            third = block(1)
            del third
        assert tracker.now == 0
        assert tracker.peaks["forward"] == {"activations": 12 * KIB}

    def test_views_count_once(self):
        with MemoryTracker() as tracker:
            whole = block(4)
            half = whole[: 2 * KIB].view(2, KIB)
            del whole
            assert tracker.now == 4 * KIB
            del half
            assert tracker.now == 0

    def test_what_autograd_keeps_is_alive(self):
        weight = torch.ones(256, requires_grad=True)
        with MemoryTracker() as tracker:
            tracker.ignore([weight])
            result = (weight * 2).square().sum()
            kept = tracker.now
            assert kept >= 1 * KIB
            result.backward()
            del result
            assert tracker.now < kept
            assert weight.grad is not None

    def test_phases_and_labels(self):
        with MemoryTracker() as tracker:
            tracker.phase, tracker.label = "one", "red"
            red = block(1)
            tracker.phase, tracker.label = "two", "blue"
            blue = block(2)
            tracker.relabel(blue, "green")
            more = block(4)
        assert tracker.peaks["one"] == {"red": KIB}
        assert tracker.peaks["two"] == {"red": KIB, "green": 2 * KIB, "blue": 4 * KIB}
        del red, more

    def test_what_is_ignored_counts_nothing(self):
        weight = block(4)
        with MemoryTracker() as tracker:
            tracker.ignore([weight])
            view = weight[:KIB]
            assert tracker.now == 0
            del view

    def test_sizes_are_rounded_up_as_on_a_gpu(self):
        with MemoryTracker(512) as tracker:
            small = torch.empty(1)
            assert tracker.now == 512
            del small

    def test_fake_tensors_count_like_real_ones(self):
        with FakeTensorMode(), MemoryTracker() as tracker:
            left, right = torch.empty(64, 64), torch.empty(64, 64)
            product = left @ right
            assert tracker.now == 3 * 64 * 64 * 4
            del product
            assert tracker.now == 2 * 64 * 64 * 4
