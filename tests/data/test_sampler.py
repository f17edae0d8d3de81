"""Orders of an epoch: equal to the original's recordings, and lawful for every size."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from llava_ft.data.sampler import (
    STRATEGIES,
    EpochSampler,
    balanced_order,
    even_chunks,
    mixed_steps,
    modality_order,
    sorted_order,
    steps_per_epoch,
)
from llava_ft.errors import UserError

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "sampler.json").read_text())


class Lengths(list):
    """A data set of which only the lengths are known, negative for a sample without images."""

    @property
    def lengths(self):
        return [abs(length) for length in self]

    @property
    def modality_lengths(self):
        return list(self)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def case_id(case):
    return "{lengths}-b{batch_size}-w{world_size}-s{seed}-g{gen_seed}".format(**case)


def is_mixed(lengths):
    return min(lengths) < 0 < max(lengths)


class TestRecordings:
    @pytest.mark.parametrize("case", RECORDED["length_grouped"], ids=case_id)
    def test_balanced_order(self, case):
        # Without a generator of its own the original draws from the global one, which had been seeded.
        seed = case["seed"] if case["gen_seed"] is None else case["gen_seed"]
        lengths = RECORDED["lengths"][case["lengths"]]
        assert balanced_order(lengths, case["batch_size"], case["world_size"], generator(seed)) == case["indices"]

    @pytest.mark.parametrize("case", RECORDED["modality_grouped"], ids=case_id)
    def test_modality_order(self, case):
        lengths = RECORDED["lengths"][case["lengths"]]
        shape = case["batch_size"], case["world_size"]
        if case["gen_seed"] is None or not is_mixed(lengths):
            seed = case["seed"] if case["gen_seed"] is None else case["gen_seed"]
            assert modality_order(lengths, *shape, generator(seed)) == case["indices"]
            return
        # The original uses the given generator for the steps only, and the global one inside each kind.
        inner = generator(case["seed"])
        orders = []
        for members in (
            [i for i, n in enumerate(lengths) if n > 0],
            [i for i, n in enumerate(lengths) if n < 0],
        ):
            order = balanced_order([abs(lengths[i]) for i in members], *shape, inner)
            orders.append([members[i] for i in order])
        assert mixed_steps(orders, shape[0] * shape[1], generator(case["gen_seed"])) == case["indices"]

    @pytest.mark.parametrize("case", RECORDED["split_to_even_chunks"])
    def test_even_chunks(self, case):
        assert even_chunks(case["indices"], case["lengths"], case["num_chunks"]) == case["chunks"]

    @pytest.mark.parametrize("case", RECORDED["sharded"], ids=lambda case: case["lengths"])
    def test_ranks_take_the_batches_of_an_order_in_turn(self, case):
        batch_size, world_size = case["per_device_batch"], case["world_size"]
        lengths = RECORDED["lengths"][case["lengths"]]
        step_world = world_size * case["gradient_accumulation_steps"]
        order = modality_order(lengths, batch_size, step_world, generator(case["seed"]))
        dealt = [i for step in zip(*case["ranks"], strict=True) for batch in step for i in batch]
        assert dealt[: len(order)] == order

    def test_length_strategy_is_that_of_transformers(self):
        lengths = RECORDED["lengths"]["pos64"]
        for batch_size in (1, 2, 3, 4, 64):
            expected = get_length_grouped_indices(lengths, batch_size, generator=generator(5))
            assert sorted_order(lengths, batch_size, 1, generator(5)) == expected


LENGTHS = st.lists(st.integers(-300, 300), max_size=70)
STEP = st.integers(1, 9)


class TestLaws:
    @given(LENGTHS, STEP, STEP, st.sampled_from(STRATEGIES), st.integers(-5, 2**40), st.integers(0, 50))
    def test_every_epoch_visits_every_sample_once(self, lengths, batch, world, strategy, seed, epoch):
        sampler = EpochSampler(Lengths(lengths), strategy=strategy, batch_size=batch, world_size=world, seed=seed)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(len(lengths)))
        assert len(sampler) == len(lengths)
        torch.rand(3)
        assert list(sampler) == order

    @given(
        LENGTHS,
        STEP,
        st.integers(1, 5),
        st.integers(1, 4),
        st.sampled_from(STRATEGIES),
        st.integers(0, 20),
        st.data(),
    )
    def test_ranks_share_an_epoch_and_resume_anywhere(self, lengths, batch, ranks, accumulation, strategy, epoch, data):
        """Whatever the ranks, together they visit each sample once; what is skipped is what had been visited."""

        def loader_of(rank):
            sampler = EpochSampler(Lengths(lengths), strategy=strategy, batch_size=batch, world_size=ranks)
            sampler.set_epoch(epoch)
            batches = BatchSampler(sampler, batch, drop_last=False)
            return list(BatchSamplerShard(batches, ranks, rank, even_batches=True))

        by_rank = [loader_of(rank) for rank in range(ranks)]
        assert len({len(batches) for batches in by_rank}) == 1
        dealt = [position for step in zip(*by_rank, strict=True) for positions in step for position in positions]
        assert set(dealt) == set(range(len(lengths)))
        assert len(set(dealt[: len(lengths)])) == len(lengths)
        assert steps_per_epoch(len(lengths), batch, ranks, accumulation) == max(1, -(-len(by_rank[0]) // accumulation))
        done = data.draw(st.integers(0, len(by_rank[0])))
        assert [loader_of(rank)[done:] for rank in range(ranks)] == [batches[done:] for batches in by_rank]

    @given(LENGTHS, STEP, STEP, st.integers(0, 100))
    def test_whole_steps_hold_one_modality(self, lengths, batch, world, seed):
        order = modality_order(lengths, batch, world, generator(seed))
        step = batch * world
        num_images = sum(length > 0 for length in lengths)
        if num_images in (0, len(lengths)):
            return
        leftover = sum((count % step) or step for count in (num_images, len(lengths) - num_images))
        for start in range(0, len(lengths) - leftover, step):
            assert len({lengths[i] > 0 for i in order[start : start + step]}) == 1

    @given(st.lists(st.integers(0, 300), min_size=1, max_size=70), STEP, STEP, st.integers(0, 100))
    def test_longest_sample_comes_first(self, lengths, batch, world, seed):
        assert lengths[sorted_order(lengths, batch, world, generator(seed))[0]] == max(lengths)

    @given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 9))
    def test_chunks_are_even(self, lengths, num_chunks):
        chunks = even_chunks(range(len(lengths)), lengths, num_chunks)
        assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
        assert max(map(len, chunks)) - min(map(len, chunks)) <= 1


class TestEpochSampler:
    @pytest.mark.parametrize("strategy", ["random", "length", "modality_length"])
    def test_epochs_and_seeds_differ(self, strategy):
        lengths = Lengths(RECORDED["lengths"]["mix64"])
        orders = set()
        for seed in (0, 1, 2):
            sampler = EpochSampler(lengths, strategy=strategy, batch_size=2, seed=seed)
            for epoch in range(3):
                sampler.set_epoch(epoch)
                orders.add(tuple(sampler))
        assert len(orders) == 9

    def test_sequential_keeps_the_order_of_the_records(self):
        assert list(EpochSampler(Lengths([4] * 5), strategy="sequential", seed=3)) == [0, 1, 2, 3, 4]

    def test_ignores_and_leaves_the_global_generator(self):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        order = list(EpochSampler(Lengths([4] * 20), seed=1))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(99)
        assert list(EpochSampler(Lengths([4] * 20), seed=1)) == order

    def test_length_pads_less(self):
        lengths = torch.randint(1, 500, (2000,), generator=generator(0)).tolist()

        def padding(order):
            batches = [order[i : i + 8] for i in range(0, len(order), 8)]
            return sum(len(b) * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches)

        def order(strategy):
            return list(EpochSampler(Lengths(lengths), strategy=strategy, batch_size=8, world_size=2))

        assert padding(order("length")) < padding(order("random")) / 5

    def test_zero_lengths_and_one_modality_work(self):
        # The original stops with "Should not have zero length." on both of its recorded cases.
        for case in RECORDED["errors"]:
            order = modality_order(case["lengths"], 2, 2, generator(0))
            assert sorted(order) == list(range(len(case["lengths"])))
        assert sorted(modality_order([-3, -4, 0], 1, 1)) == [0, 1, 2]

    def test_refuses_an_unknown_strategy(self):
        with pytest.raises(UserError, match=r"strategy is 'len'; it can be random, sequential, length, modality"):
            EpochSampler(Lengths([1]), strategy="len")

    def test_refuses_empty_batches(self):
        with pytest.raises(UserError, match="batch_size is 0 and world_size 1; both must be at least 1"):
            EpochSampler(Lengths([1]), batch_size=0)
