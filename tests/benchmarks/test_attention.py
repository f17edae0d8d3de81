"""The check of attention kernels finds a wrong one; on a GPU it runs the kernels as they are."""

import argparse
from dataclasses import replace

import attention
import pytest
import torch
from attention import ALLOWED, BY_SAMPLE, check, page

from llava_ft.args.attention import obstacle, this_machine

CPU = torch.device("cpu")


def test_torch_s_kernel_on_each_sample_passes():
    assert check(["sdpa"], CPU, torch.float32)["sdpa"]["passes"]
    assert check(["sdpa"], CPU, torch.bfloat16)["sdpa"]["passes"]


@pytest.mark.parametrize("mistake", ["leak", "gradient"])
def test_a_wrong_kernel_does_not(monkeypatch, mistake):
    right = attention.caller

    def caller(kernel, shape, rows, device):
        if mistake == "leak":  # all samples of a row as one
            return right(kernel, replace(shape, lengths=(sum(shape.lengths) // rows,) * rows), rows, device)
        attend = right(kernel, shape, rows, device)
        return lambda query, key, value: attend(query, key * 0.5 + key.detach() * 0.5, value)

    monkeypatch.setattr(attention, "caller", caller)
    found = check(["sdpa"], CPU, torch.float32)["sdpa"]
    assert not found["passes"]
    output, *gradients = found["error_to_plain"][0]
    assert (output > ALLOWED) == (mistake == "leak")
    assert max(gradients) > ALLOWED


def test_the_page_has_a_line_for_each_kernel():
    result = attention.run(argparse.Namespace(check=False, time=False, dry_run=True))
    text = page(result)
    for kernel in BY_SAMPLE:
        assert f"| {kernel} |" in text or f"- {kernel} was not run: " in text
    assert "DIFFERS" not in text


def test_a_kernel_that_fails_is_a_line(monkeypatch):
    def caller(kernel, shape, rows, device):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(attention, "caller", caller)
    result = attention.run(argparse.Namespace(check=False, time=False, dry_run=True))
    assert not result["check"]["sdpa"]["passes"]
    assert page(result).count("| RuntimeError: no kernel image is available for execution on the device |") >= 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", BY_SAMPLE)
def test_on_a_gpu(kernel):
    reason = obstacle(kernel, this_machine(has_gpu=True, is_half=True))
    if reason is not None:
        pytest.skip(reason)
    found = check([kernel], torch.device("cuda"), torch.bfloat16)
    assert found[kernel]["passes"], found
