"""W4A4Linear whose input takes 8 bits in some timestep bins, against the definition and against plain 4-bit layers."""

import copy

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from benchmarks.linear_memory import linear_peak
from stepquant.errors import InvalidInput, UserError
from stepquant.formats import Format
from stepquant.runtime import linear as linear_module
from stepquant.runtime.layout import QuantizationSettings
from stepquant.runtime.linear import W4A4Linear
from tests.runtime.definition import EIGHT_BITS, FORMATS, OFFSETS, RATIOS, K, N, activation_by_hand, make_linear

SCHEDULES = [(), (1,), (0, 2), (0, 1, 2)]
every_format = pytest.mark.parametrize("fmt", FORMATS)


def random_input(*shape):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 3, K)


@every_format
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize("bins", SCHEDULES, ids=str)
def test_input_equals_the_definition(fmt, rounding, bins):
    """Listed bins: the 8-bit format, without clip and offset; the others: 4 bits with theirs."""
    linear, x = make_linear(fmt, fmt, rounding=rounding, eight_bit_bins=bins), random_input(3)
    smoothed = x / linear.smooth_factor.float()
    for b in range(3):
        linear.bin.set(b)
        if b in bins:
            expected = activation_by_hand(smoothed, EIGHT_BITS[fmt], 1.0, 0, rounding)
        else:
            expected = activation_by_hand(smoothed, fmt, RATIOS[b], OFFSETS[b], rounding)
        torch.testing.assert_close(linear.quantized_input(x), expected, rtol=0, atol=0)


@every_format
def test_bins_of_four_bits_are_those_of_a_four_bit_layer(fmt):
    plain = make_linear(fmt, fmt, mean_subtraction=True, rotation=16)
    linear = make_linear(fmt, fmt, mean_subtraction=True, rotation=16, eight_bit_bins=(1,))
    assert set(linear.state_dict()) == set(plain.state_dict())
    x = random_input(3).bfloat16()
    for b, equal in enumerate((True, False, True)):
        linear.bin.set(b)
        plain.bin.set(b)
        assert torch.equal(linear(x), plain(x)) == equal


@every_format
@pytest.mark.parametrize("shape", [(5,), (2, 3), ()], ids=str)
def test_samples_of_one_batch_in_both_precisions(fmt, shape, monkeypatch):
    """Three samples in three bins, by three calls of one sample; in one piece and in slabs across samples."""
    linear, x = make_linear(fmt, fmt, mean_subtraction=True, eight_bit_bins=(0, 2)), random_input(3, *shape)
    alone = []
    for sample, b in zip(x, (2, 1, 0)):
        linear.bin.set(b)
        alone.append(linear(sample))
    linear.bin.set(torch.tensor([2, 1, 0]))
    torch.testing.assert_close(linear(x), torch.stack(alone), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(linear_module, "TOKENS_PER_SLAB", 2)
    torch.testing.assert_close(linear(x), torch.stack(alone), rtol=1e-5, atol=1e-5)


@every_format
@pytest.mark.parametrize("bins", [(1,), (0, 1, 2)], ids=str)
def test_one_graph_for_all_bins(fmt, bins):
    torch._dynamo.reset()
    linear, counter, x = make_linear(fmt, fmt, eight_bit_bins=bins), CompileCounter(), random_input(2, 5)
    compiled = torch.compile(linear, backend=counter, fullgraph=True)
    for current in (0, 1, 2):
        linear.bin.set(current)
        assert torch.equal(compiled(x), linear(x))
    assert counter.frame_count == 1
    for batch in ([0, 1], [2, 2], [1, 0]):  # one timestep per sample: another shape, hence one more graph
        linear.bin.set(torch.tensor(batch))
        assert torch.equal(compiled(x), linear(x))
    assert counter.frame_count == 2


def test_layers_with_other_lists_share_a_graph():
    """So that diffusers' compile_repeated_blocks does not compile each block of a schedule anew."""
    torch._dynamo.reset()
    counter, x = CompileCounter(), random_input(5)
    compiled = torch.compile(lambda linear, x: linear(x), backend=counter, fullgraph=True)
    for bins in ((0,), (1,), (0, 2)):
        linear = make_linear("int4", "int4", eight_bit_bins=bins)
        linear.bin.set(1)
        assert torch.equal(compiled(linear, x), linear(x))
    assert counter.frame_count == 1


@every_format
@pytest.mark.parametrize("bins", SCHEDULES, ids=str)
def test_a_layer_of_one_precision_does_not_compute_the_other(fmt, bins, monkeypatch):
    computed, fake_quantize = set(), Format.fake_quantize
    monkeypatch.setattr(
        Format, "fake_quantize", lambda self, *x, **how: computed.add(self.name) or fake_quantize(self, *x, **how)
    )
    make_linear(fmt, fmt, eight_bit_bins=bins)(random_input(2))
    assert computed == {(): {fmt}, (0, 1, 2): {EIGHT_BITS[fmt]}}.get(bins, {fmt, EIGHT_BITS[fmt]})


@every_format
def test_a_layer_of_one_precision_has_no_table(fmt):
    buffers = [set(dict(make_linear(fmt, fmt, eight_bit_bins=bins).named_buffers())) for bins in SCHEDULES]
    assert buffers[0] == buffers[3] and buffers[1] == buffers[2] == buffers[0] | {"has_eight_bits"}


@every_format
def test_mixed_precision_needs_one_more_rounded_slab(fmt):
    """Bytes alive: at most the 8-bit rounding of a slab in the input's dtype, and the result of the selection."""
    shape = (2048, 3456, 1280)
    four, mixed, eight = (linear_peak(fmt, *shape, eight_bit_bins=bins)[0] for bins in ((), (1,), (0, 1)))
    assert mixed <= four + 2 * linear_module.TOKENS_PER_SLAB * shape[1] * 2
    assert eight <= 1.2 * four


def test_moves_and_copies_keep_the_bins():
    linear, x = make_linear("int4", "int4", eight_bit_bins=(1,)), random_input(3)
    linear.bin.set(1)
    expected = linear(x)
    for other in (copy.deepcopy(linear), copy.deepcopy(linear).half(), copy.deepcopy(linear).to(torch.bfloat16)):
        assert other.has_eight_bits.dtype == torch.bool
        other.bin.set(0)
        assert not torch.equal(other(x), expected)
        other.bin.set(1)
        assert torch.equal(other(x), expected)


def test_the_table_has_values_where_the_rest_is_on_meta():
    settings = QuantizationSettings(
        "int4", "int4", "ceil", "absmax", 0, False, {}, (9.0, 5.0, 0.0), ("a",), "int8", {"a": (1,)}
    )
    linear = W4A4Linear(K, N, True, settings, device="meta", eight_bit_bins=(1,))
    assert linear.qweight.is_meta and linear.has_eight_bits.tolist() == [False, True]


def test_the_group_of_eight_bits_must_divide_the_channels():
    """48 channels are three groups of nvfp4, but not a whole number of mxfp8."""
    settings = QuantizationSettings(
        "nvfp4", "nvfp4", "ceil", "absmax", 0, False, {}, (9.0, 0.0), ("a",), "mxfp8", {"a": (0,)}
    )
    W4A4Linear(48, N, True, settings, device="cpu")
    with pytest.raises(UserError, match="48 channels .* mxfp8 groups; allowed: a multiple of 32"):
        W4A4Linear(48, N, True, settings, device="cpu", eight_bit_bins=(0,))


@pytest.mark.parametrize("bins", [(3,), (-1,), (0, 3)], ids=str)
def test_bins_that_do_not_exist(bins):
    settings = QuantizationSettings(
        "int4", "int4", "ceil", "absmax", 0, False, {}, (9.0, 0.0), ("a",), "int8", {"a": (0,)}
    )
    with pytest.raises(InvalidInput, match="eight_bit_format 'int8' and 1 bins; allowed: indices of bins"):
        W4A4Linear(K, N, True, settings, device="cpu", eight_bit_bins=bins)


def test_bins_without_a_format():
    settings = QuantizationSettings("int4", "int4", "ceil", "absmax", 0, False, {}, (9.0, 0.0), ("a",))
    with pytest.raises(InvalidInput, match=r"are \[0\], but the settings have eight_bit_format None"):
        W4A4Linear(K, N, True, settings, device="cpu", eight_bit_bins=(0,))


def test_repr_says_it():
    assert "activation=int4 (int8 in bins 0, 2), rank=4" in repr(make_linear("int4", "int4", eight_bit_bins=(0, 2)))
    assert "activation=int4, rank=4" in repr(make_linear("int4", "int4"))
