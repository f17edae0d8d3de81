"""Every kernel's wrapper attends within samples, as a slow reference in float64 does.

Kernels of GPUs are replaced by functions of the same signature; `tests/benchmarks/test_attention.py` runs them as they
are, on a GPU.
"""

import inspect
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import varlen
from transformers import Gemma2Config, MistralConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_ft.errors import UserError
from llava_ft.models.attention import kernels
from llava_ft.models.attention.boundaries import SampleBoundaries, find_boundaries
from tests.models.attention import reference

KERNELS = ["sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention"]
WITH_GRADIENT = KERNELS[:-1]
LENGTHS = (11, 1, 130, 7)
TOTAL = sum(LENGTHS)

pytestmark = [
    pytest.mark.usefixtures("gpu_kernels"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


class Layer(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


def run(kernel: str, *tensors: torch.Tensor, **arguments) -> torch.Tensor:
    """Call a kernel as a layer of transformers does."""
    return ALL_ATTENTION_FUNCTIONS[kernels.register(kernel)](Layer(), *tensors, None, **arguments)[0]


def make(rows: int = 1, length: int = TOTAL, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries of four heads, keys and values of two, laid out as the projections of a layer are."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(rows, length, heads, 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes]


def expected(query, key, value, lengths, scale=None, window=None) -> torch.Tensor:
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    return reference.attend(*flat, lengths, scale, window).unflatten(0, (len(query), -1))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_joined_samples(kernel, scale):
    tensors = make()
    attended = run(kernel, *tensors, boundaries=SampleBoundaries(LENGTHS, 1, "cpu"), scaling=scale)
    assert attended.shape == (1, TOTAL, 4, 16)
    torch.testing.assert_close(attended.double(), expected(*tensors, LENGTHS, scale), atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", [1, 9, 129, 130])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sliding_window(kernel, window):
    tensors = make()
    attended = run(kernel, *tensors, boundaries=SampleBoundaries(LENGTHS, 1, "cpu"), sliding_window=window)
    torch.testing.assert_close(attended.double(), expected(*tensors, LENGTHS, window=window), atol=2e-6, rtol=0)


def test_a_window_as_wide_as_the_rows_changes_nothing(monkeypatch):
    """Rows that fit are computed together, as without a window."""
    tensors = make(rows=3, length=9)
    monkeypatch.setattr(kernels, "_run", None)
    for options in ({"sliding_window": 9}, {"boundaries": find_boundaries(3, 9, "cpu"), "sliding_window": 4096}):
        assert torch.equal(run("sdpa", *tensors, **options), run("sdpa", *tensors))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("given", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"indices": torch.zeros(1)}])
def test_what_a_kernel_would_leave_out_is_refused(kernel, given):
    with pytest.raises(ValueError, match=rf"has {next(iter(given))}, which the kernel {kernel} does not compute"):
        run(kernel, *make(), boundaries=SampleBoundaries(LENGTHS, 1, "cpu"), **given)


def test_a_pattern_that_a_model_adds_gets_a_mask():
    config = MistralConfig(sliding_window=None)
    config._attn_implementation = kernels.register("sdpa")
    batch = {"inputs_embeds": torch.zeros(1, 4, 8), "attention_mask": None, "past_key_values": None}
    assert create_causal_mask(config, **batch) is None
    mask = create_causal_mask(config, **batch, and_mask_function=lambda batch, head, query, key: key != 1)
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_that_looks_ahead_is_refused(kernel, monkeypatch):
    message = f"attention looks ahead, which the kernel {kernel} does not compute"
    with pytest.raises(ValueError, match=message):
        run(kernel, *make(), is_causal=False)
    monkeypatch.setattr(Layer, "is_causal", False)
    with pytest.raises(ValueError, match=message):
        run(kernel, *make())


def test_a_model_with_a_soft_cap_takes_eager():
    config = Gemma2Config(attn_logit_softcapping=50.0)
    assert [kernels.fitting_kernel(kernel, config) for kernel in KERNELS] == ["eager"] * len(KERNELS)
    with pytest.raises(UserError, match=r"sdpa does not go with this model: it has attn_logit_softcapping 50\.0"):
        kernels.fitting_kernel("sdpa", config, is_named=True)
    config.attn_logit_softcapping = None
    assert kernels.fitting_kernel("sdpa", config, is_named=True) == "sdpa"


@pytest.mark.parametrize("kernel", WITH_GRADIENT)
def test_gradients_of_joined_samples(kernel):
    tensors = [tensor.requires_grad_() for tensor in make()]
    weights = torch.randn(1, TOTAL, 4, 16, generator=torch.Generator().manual_seed(6))
    attended = run(kernel, *tensors, boundaries=SampleBoundaries(LENGTHS, 1, "cpu"))
    ours = torch.autograd.grad((attended * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected(*tensors, LENGTHS) * weights).sum(), tensors)
    for actual, exact in zip(ours, wanted, strict=True):
        assert (actual - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_sample_reaches_another(kernel):
    """Whatever is in the other samples, the output is bit for bit the same."""
    tensors, boundaries = make(), SampleBoundaries(LENGTHS, 1, "cpu")
    before = run(kernel, *tensors, boundaries=boundaries)
    starts = boundaries.starts
    for changed, (start, end) in enumerate(pairwise(starts)):
        others = torch.ones(TOTAL, dtype=torch.bool)
        others[start:end] = False
        moved = [tensor.clone() for tensor in tensors]
        for tensor in moved:
            tensor[:, :, start:end] += 100.0
        after = run(kernel, *moved, boundaries=boundaries)
        assert torch.equal(after[:, others], before[:, others]), changed
        assert not torch.equal(after[:, start:end], before[:, start:end])


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_are_samples(kernel):
    tensors = make(rows=3, length=9)
    attended = run(kernel, *tensors, boundaries=find_boundaries(3, 9, "cpu"))
    torch.testing.assert_close(attended.double(), expected(*tensors, [9] * 3), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_several_samples(kernel):
    tensors = make(rows=2, length=9)
    attended = run(kernel, *tensors, boundaries=SampleBoundaries([4, 5, 9], 2, "cpu"))
    torch.testing.assert_close(attended.double(), expected(*tensors, [4, 5, 9]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_boundaries_positions_tell(kernel):
    """As when the decoder runs without the model around it."""
    tensors = make()
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    attended = run(kernel, *tensors, position_ids=position_ids)
    torch.testing.assert_close(attended.double(), expected(*tensors, LENGTHS), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kernel", WITH_GRADIENT)
def test_float32_beside_half_precision_values(kernel):
    """As rotation leaves queries and keys when the residual stream is float32 and autocast computes in bf16."""
    query, key, value = make()
    with torch.autocast("cpu", torch.bfloat16):
        attended = run(kernel, query, key, value.bfloat16(), boundaries=SampleBoundaries(LENGTHS, 1, "cpu"))
    assert attended.dtype == torch.bfloat16
    exact = expected(query, key, value, LENGTHS)
    assert (attended - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_is_for_transformers_sdpa(kernel):
    query, key, value = make(rows=2, length=9)
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & (torch.arange(9) >= 3)
    mask = torch.stack([mask | torch.eye(9, dtype=torch.bool)] * 2)[:, None]
    attended, _ = ALL_ATTENTION_FUNCTIONS[kernels.register(kernel)](Layer(), query, key, value, mask)
    wanted, _ = kernels.sdpa_attention_forward(Layer(), query, key, value, mask)
    assert torch.equal(attended, wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_more_position_after_a_cache(kernel):
    query, key, value = make(length=9)
    attended = run(kernel, query[:, :, -1:], key, value)
    torch.testing.assert_close(attended[0, 0].double(), expected(query, key, value, [9])[0, -1], atol=2e-6, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_a_layer_looks_at_no_value_on_the_device(kernel, monkeypatch):
    """Fake tensors have no values: looking at one to find out where samples begin raises."""
    monkeypatch.undo()
    fake = FakeTensorMode()
    with fake:
        tensors = [torch.empty(1, heads, TOTAL, 16, dtype=torch.bfloat16) for heads in (4, 2, 2)]
        boundaries = SampleBoundaries(LENGTHS, 1, "cpu")
        assert run(kernel, *tensors, boundaries=boundaries).shape == (1, TOTAL, 4, 16)
        with pytest.raises(DynamicOutputShapeException):
            run(kernel, *tensors, position_ids=torch.empty(1, TOTAL, dtype=torch.int64))


class TestChosenQueries:
    positions = torch.tensor([0, 3, 10, 12, 100, 141, 148])

    def test_are_those_of_all(self):
        query, key, value = make()
        boundaries = SampleBoundaries(LENGTHS, 1, "cpu").count_reads(self.positions)
        attended = run(
            "sdpa",
            query[:, :, self.positions],
            key,
            value,
            boundaries=boundaries,
            query_positions=self.positions,
        )
        wanted = expected(query, key, value, LENGTHS)[:, self.positions]
        torch.testing.assert_close(attended.double(), wanted, atol=2e-6, rtol=0)

    def test_with_a_sliding_window(self):
        query, key, value = make()
        attended = run(
            "sdpa",
            query[:, :, self.positions],
            key,
            value,
            boundaries=SampleBoundaries(LENGTHS, 1, "cpu").count_reads(self.positions),
            query_positions=self.positions,
            sliding_window=5,
        )
        wanted = expected(query, key, value, LENGTHS, window=5)[:, self.positions]
        torch.testing.assert_close(attended.double(), wanted, atol=2e-6, rtol=0)

    def test_only_sdpa_takes_them(self):
        taking = [kernel for kernel in KERNELS if kernels.takes_chosen_queries(kernels.register(kernel))]
        assert taking == ["sdpa"]
        assert not kernels.takes_chosen_queries("eager")

    def test_are_looked_at_before_the_layer(self):
        with FakeTensorMode():
            query, key = torch.empty(1, 4, 7, 16), torch.empty(1, 2, TOTAL, 16)
            boundaries = SampleBoundaries(LENGTHS, 1, "cpu", read_counts=(3, 1, 3, 0))
            positions = torch.empty(7, dtype=torch.int64)
            attended = run("sdpa", query, key, key, boundaries=boundaries, query_positions=positions)
        assert attended.shape == (1, 7, 4, 16)


class TestStandIns:
    """The functions that stand for kernels of GPUs take what those take."""

    def test_varlen(self, monkeypatch):
        monkeypatch.undo()

        def arguments(function):
            return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

        assert arguments(reference.varlen_attn) == arguments(varlen.varlen_attn)

    def test_torch_takes_what_varlen_is_given(self, monkeypatch):
        """Without values: torch checks the arguments of its own kernel and says what comes out."""
        monkeypatch.undo()
        with FakeTensorMode():
            tensors = [torch.empty(1, heads, TOTAL, 64, dtype=torch.bfloat16) for heads in (4, 2, 2)]
            attended = run("varlen", *tensors, boundaries=SampleBoundaries(LENGTHS, 1, "cpu"))
        assert (attended.shape, attended.dtype) == ((1, TOTAL, 4, 64), torch.bfloat16)


class TestNothingIsFetched:
    def test_a_package_that_is_not_there_is_refused(self, monkeypatch):
        for name in ("is_flash_attn_2_available", "is_flash_attn_3_available"):
            monkeypatch.setattr(kernels, name, lambda: False)
        for kernel in ("flash_attention_2", "flash_attention_3"):
            with pytest.raises(UserError, match=f"attn_implementation is {kernel}, whose package is not installed"):
                kernels.register(kernel)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_transformers_does_not_take_our_names_for_kernels_of_a_hub(self, kernel):
        """It looks for a package, and asks a hub, when it finds "flash" in a name or a name like a repository's."""
        name = kernels.register(kernel)
        assert "flash" not in name
        assert "/" not in name
        assert name not in ("sdpa", "flex_attention", "eager")


def test_an_unknown_kernel_is_refused():
    with pytest.raises(UserError, match=r"attn_implementation is 'xformers'\. Allowed: sdpa, varlen, .*eager"):
        kernels.register("xformers")


@pytest.mark.parametrize("kernel", ["varlen", "flex_attention", "flash_attention_3"])
def test_dropout_is_refused_where_there_is_none(kernel):
    with pytest.raises(ValueError, match=f"has dropout, which the kernel {kernel} does not compute. Use .* sdpa"):
        run(kernel, *make(), boundaries=SampleBoundaries(LENGTHS, 1, "cpu"), dropout=0.1)


def test_a_compiled_layer_is_not_compiled_anew_for_every_batch():
    """Batches of joined samples have other lengths each time; nothing of them is part of the graph."""
    counter = torch._dynamo.testing.CompileCounter()

    def layer(query, key, value, boundaries):
        return run("sdpa", query * 2, key, value, boundaries=boundaries) + 1

    torch._dynamo.reset()
    compiled, tensors = torch.compile(layer, backend=counter), make()
    for first in range(1, 9):
        boundaries = SampleBoundaries([first, TOTAL - first], 1, "cpu")
        torch.testing.assert_close(compiled(*tensors, boundaries), layer(*tensors, boundaries))
    assert counter.frame_count <= 3
