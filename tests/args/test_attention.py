"""Which attention kernel a run takes, on machines that are not there."""

import dataclasses

import pytest

from llava_ft.args import attention
from llava_ft.args.attention import KERNELS, AttentionMachine, choose_kernel, installed_kernels, obstacle, this_machine
from llava_ft.errors import UserError

H200 = AttentionMachine(True, True, frozenset(KERNELS), (9, 0))
CPU = AttentionMachine(False, True, frozenset(KERNELS))


def without(machine: AttentionMachine, *kernels: str) -> AttentionMachine:
    return dataclasses.replace(machine, installed=machine.installed - set(kernels))


class TestAuto:
    @pytest.mark.parametrize(
        ("machine", "chosen"),
        [
            (H200, "flash_attention_3"),
            (without(H200, "flash_attention_3"), "flash_attention_2"),
            (without(H200, "flash_attention_3", "flash_attention_2"), "varlen"),
            (without(H200, "flash_attention_3", "flash_attention_2", "varlen"), "sdpa"),
            (dataclasses.replace(H200, capability=(10, 0)), "flash_attention_2"),
            (dataclasses.replace(H200, capability=(7, 5)), "sdpa"),
            (dataclasses.replace(H200, is_half=False), "sdpa"),
            (dataclasses.replace(H200, is_rocm=True, capability=(9, 4)), "flash_attention_2"),
            (without(dataclasses.replace(H200, is_rocm=True), "flash_attention_2"), "sdpa"),
            (CPU, "sdpa"),
        ],
    )
    def test_takes_the_fastest_that_runs(self, machine, chosen):
        assert choose_kernel("auto", machine, []) == chosen

    def test_says_what_and_why(self):
        notes: list[str] = []
        choose_kernel("auto", without(H200, "flash_attention_3", "flash_attention_2"), notes)
        choose_kernel("auto", H200, notes)
        choose_kernel("auto", CPU, notes)
        assert notes == [
            "attn_implementation=auto takes varlen: not flash_attention_3, flash-attn-3 is not installed; "
            "not flash_attention_2, flash-attn is not installed.",
            "attn_implementation=auto takes flash_attention_3.",
            "attn_implementation=auto takes sdpa: there is no GPU.",
        ]


class TestNamed:
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_is_taken_where_it_runs(self, kernel):
        notes: list[str] = []
        assert choose_kernel(kernel, H200, notes) == kernel
        assert notes == []

    @pytest.mark.parametrize("kernel", KERNELS[:-2])
    def test_is_replaced_on_a_cpu(self, kernel):
        notes: list[str] = []
        assert choose_kernel(kernel, CPU, notes) == "sdpa"
        assert notes == [f"attn_implementation={kernel} is replaced by sdpa: it needs a GPU."]

    def test_is_refused_on_a_gpu_that_lacks_its_package(self):
        machine = without(H200, "flash_attention_3", "flash_attention_2")
        with pytest.raises(
            UserError,
            match=r"^attn_implementation=flash_attention_2 cannot be used: flash-attn is not installed\. What runs "
            r"here: varlen, flex_attention, sdpa, eager\. Install it with pip install flash-attn --no-build-isolation, "
            r"or use auto, which takes varlen\.$",
        ):
            choose_kernel("flash_attention_2", machine, [])

    @pytest.mark.parametrize(
        ("kernel", "machine", "reason"),
        [
            (
                "varlen",
                dataclasses.replace(H200, is_half=False),
                "it needs bf16 or fp16. What runs here: flex_attention",
            ),
            ("varlen", dataclasses.replace(H200, capability=(7, 5)), "8.0 .Ampere. or newer, and this one has 7.5"),
            ("varlen", dataclasses.replace(H200, is_rocm=True), "it needs an NVIDIA GPU"),
            ("flash_attention_3", dataclasses.replace(H200, capability=(12, 0)), "8.0 to 9.0, and this one has 12.0"),
            ("varlen", without(H200, "varlen"), "Install torch 2.10 or newer"),
            ("flex_attention", without(H200, "flex_attention"), "pip install triton"),
        ],
    )
    def test_is_refused_where_it_does_not_run(self, kernel, machine, reason):
        with pytest.raises(UserError, match=reason):
            choose_kernel(kernel, machine, [])

    def test_a_gpu_that_is_not_known_is_trusted(self):
        assert obstacle("flash_attention_3", dataclasses.replace(H200, capability=None)) is None


def test_packages_are_looked_up_without_a_hub(monkeypatch: pytest.MonkeyPatch):
    """transformers counts a kernel that it could fetch from a hub as available if it is asked to."""
    asked: list[tuple[object, ...]] = []
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
        monkeypatch.setattr(attention, name, lambda *args, **kwargs: bool(asked.append((*args, *kwargs))))
    found = installed_kernels()
    assert asked == [(), ()]
    assert {"sdpa", "eager"} <= found
    assert not found & {"flash_attention_2", "flash_attention_3"}


def test_a_machine_without_a_gpu_has_no_capability():
    machine = this_machine(has_gpu=False, is_half=True)
    assert (machine.has_gpu, machine.is_half, machine.capability) == (False, True, None)
