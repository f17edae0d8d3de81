"""Processes that work in order and survive what kills one of them."""

import os
import signal
import time

import pytest

from llava_ft.data.doctor.workers import Workers, context


def double(task):
    return 2 * task


def given(task):
    return context() + task


def slow_when_even(task):
    if task % 2 == 0:
        time.sleep(0.05)
    return task


def killed_by_seven(task):
    if task == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def fails_at_three(task):
    if task == 3:
        raise ValueError("three")
    return task


def blame(task):
    return -task


@pytest.mark.parametrize("number", [1, 2])
def test_results_are_in_order(number):
    with Workers(number, 100) as workers:
        assert list(workers.map(slow_when_even, range(30), blame)) == list(range(30))
        assert list(workers.map(given, range(5), blame)) == [100, 101, 102, 103, 104]
        assert list(workers.map(double, [], blame)) == []
    assert context() is None


def test_tasks_are_drawn_as_they_are_needed():
    drawn = []

    def tasks():
        for task in range(1000):
            drawn.append(task)
            yield task

    with Workers(2, None) as workers:
        results = workers.map(double, tasks(), blame)
        assert next(results) == 0
        assert len(drawn) < 20
        results.close()


def test_a_task_that_kills_its_process_is_named_and_the_others_are_done():
    with Workers(2, None) as workers:
        assert list(workers.map(killed_by_seven, range(20), blame)) == [*range(7), -7, *range(8, 20)]


@pytest.mark.parametrize("number", [1, 2])
def test_errors_arrive(number):
    with Workers(number, None) as workers, pytest.raises(ValueError, match="three"):
        list(workers.map(fails_at_three, range(10), blame))
