"""Where samples begin: from their lengths, from positions, or one in each row."""

import pytest
import torch

from llava_ft.models.attention.boundaries import SampleBoundaries, find_boundaries


def test_lengths_of_a_joined_row():
    found = find_boundaries(1, 6, "cpu", sample_lengths=[3, 1, 2])
    assert (found.lengths, found.starts, found.max_length, found.are_rows) == ((3, 1, 2), (0, 3, 4, 6), 3, False)
    assert found.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert found.cu_seqlens.dtype == torch.int32
    assert found.position_ids().tolist() == [[0, 1, 2, 0, 0, 1]]


def test_each_row_is_a_sample_unless_something_else_is_said():
    for found in (
        find_boundaries(2, 3, "cpu"),
        find_boundaries(2, 3, "cpu", position_ids=torch.arange(3)[None]),
        find_boundaries(2, 3, "cpu", sample_lengths=[3, 3]),
    ):
        assert (found.lengths, found.are_rows) == ((3, 3), True)
        assert found.position_ids().tolist() == [[0, 1, 2], [0, 1, 2]]


def test_positions_that_do_not_go_on_counting_begin_a_sample():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [4, 5, 6, 7, 0, 1]])
    found = find_boundaries(2, 6, "cpu", position_ids=positions)
    assert (found.lengths, found.are_rows) == ((3, 1, 2, 4, 2), False)


def test_lengths_are_believed_and_positions_not_looked_at():
    """Looking at them would wait for the device: these have no values to look at."""
    positions = torch.empty(1, 6, dtype=torch.int64, device="meta")
    assert find_boundaries(1, 6, "cpu", sample_lengths=[2, 4], position_ids=positions).lengths == (2, 4)


@pytest.mark.parametrize("lengths", [[], [2, 3], [7], [6, 0], [8, -2]])
def test_lengths_that_are_not_the_row_s_are_refused(lengths):
    with pytest.raises(ValueError, match=rf"are \[.*\], {sum(lengths)} in all, .* 1 rows of 6 positions"):
        find_boundaries(1, 6, "cpu", sample_lengths=lengths)


def test_a_sample_may_not_go_over_the_end_of_a_row():
    with pytest.raises(ValueError, match="lies in one row"):
        find_boundaries(2, 3, "cpu", sample_lengths=[2, 2, 2])


def test_reads_are_counted_by_sample():
    boundaries = SampleBoundaries([3, 1, 2], 1, "cpu")
    assert boundaries.count_reads(torch.tensor([0, 2, 4, 5])).read_counts == (2, 0, 2)
    assert boundaries.count_reads(torch.tensor([3])).read_counts == (0, 1, 0)
    assert boundaries.count_reads(torch.empty(0, dtype=torch.int64)).read_counts == (0, 0, 0)


def test_one_sample_s_reads_are_counted_without_looking_at_them():
    positions = torch.empty(4, dtype=torch.int64, device="meta")
    assert SampleBoundaries([6], 1, "cpu").count_reads(positions).read_counts == (4,)
