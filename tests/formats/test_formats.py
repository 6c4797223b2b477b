"""Properties of every format."""

from typing import get_args

import pytest
import torch

from stepquant.errors import UserError
from stepquant.formats import (
    activation_formats,
    check_finite,
    check_groups,
    eight_bit_partner,
    get_format,
    nvfp4_tensor_scale,
    weight_formats,
    weight_scales,
)
from stepquant.param_recipe import ActivationFormat, WeightFormat

from .inputs import MAGNITUDES, heavy_tailed

NAMES = ["int4", "mxfp4", "nvfp4", "int8", "mxfp8"]
every_format = pytest.mark.parametrize("fmt", [get_format(name) for name in NAMES], ids=NAMES)


def test_names_groups_and_bits():
    facts = {name: (get_format(name).name, get_format(name).group, get_format(name).bits) for name in NAMES}
    # bits of a code + scale bits / group: 16/64, 8/32, 8/16
    assert facts == {
        "int4": ("int4", 64, 4.25),
        "mxfp4": ("mxfp4", 32, 4.25),
        "nvfp4": ("nvfp4", 16, 4.5),
        "int8": ("int8", 64, 8.25),
        "mxfp8": ("mxfp8", 32, 8.25),
    }


def test_what_the_formats_are_for():
    """Parameters allow the same ones; their module does not import torch, so it has lists of its own."""
    assert weight_formats() == ("int4", "mxfp4", "nvfp4", "asym_w4a8") == get_args(WeightFormat)
    assert activation_formats() == ("int4", "mxfp4", "nvfp4", "int8_row") == get_args(ActivationFormat)


def test_partners():
    partners = {name: eight_bit_partner(get_format(name)).name for name in activation_formats()}
    assert partners == {"int4": "int8", "mxfp4": "mxfp8", "nvfp4": "mxfp8", "int8_row": "int8_row"}
    with pytest.raises(UserError, match="asym_w4a8 is a format of weights alone; allowed: int4, mxfp4, nvfp4"):
        eight_bit_partner(get_format("asym_w4a8"))


def test_unknown_format_names_the_known_ones():
    with pytest.raises(UserError, match="'fp4' does not exist; allowed: int4, mxfp4, nvfp4"):
        get_format("fp4")


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_fake_quantize_is_encode_then_decode(fmt, dtype, clip):
    x = heavy_tailed(1.0, dtype)
    scales = fmt.scales(x, clip=clip)
    codes = fmt.encode(x, scales)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and codes.max().item() < 2**fmt.code_bits
    quantized = fmt.fake_quantize(x, clip=clip)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, fmt.decode(codes, scales).to(dtype))


@every_format
@pytest.mark.parametrize("scale", MAGNITUDES.values(), ids=MAGNITUDES.keys())
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_quantizing_twice_changes_nothing(fmt, scale, rounding):
    """At clip 1 the largest value of a group stays the largest and gives the same scale, or one half as large."""
    x = heavy_tailed(scale)
    once = fmt.fake_quantize(x, rounding=rounding)
    assert torch.equal(fmt.fake_quantize(once, rounding=rounding), once)


@every_format
def test_the_input_is_not_changed(fmt):
    x = heavy_tailed(1.0)
    before = x.clone()
    scales = fmt.scales(x)
    fmt.encode(x, scales)
    fmt.fake_quantize(x)
    assert torch.equal(x, before)


@every_format
def test_rounds_to_the_nearest_decodable_value(fmt):
    """Exhaustive: no other code of the group is nearer to any value."""
    x = heavy_tailed(1.0)[24:28]
    scales = fmt.scales(x)
    codes = range(2**fmt.code_bits)
    every_code = torch.stack([fmt.decode(torch.full(x.shape, c, dtype=torch.uint8), scales) for c in codes])
    nearest = (every_code - x).abs().nan_to_num(torch.inf).amin(0)  # E4M3 has two codes for NaN
    assert torch.equal((fmt.fake_quantize(x) - x).abs(), nearest)


@every_format
def test_a_group_that_does_not_divide_the_channels_is_refused(fmt):
    K = fmt.group + 8
    with pytest.raises(UserError, match=f"ffn.up: {K} channels .* {fmt.name} .* multiple of {fmt.group}"):
        check_groups(K, fmt, "ffn.up")
    for call in (fmt.scales, fmt.fake_quantize):
        with pytest.raises(UserError, match=f"{K} channels"):
            call(torch.ones(2, K))
    check_groups(3 * fmt.group, fmt, "ffn.up")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_refused(bad):
    x = torch.zeros(3, 64)
    check_finite(x, "x")
    x[1, 5] = x[2, 0] = bad
    with pytest.raises(UserError, match=r"blocks.0.ffn.up: 2 of 192 values .* first at index \(1, 5\)"):
        check_finite(x, "blocks.0.ffn.up")


@every_format
def test_weight_scales(fmt):
    W = heavy_tailed(0.02)
    tensor = nvfp4_tensor_scale(W) if fmt.name == "nvfp4" else None
    scales = weight_scales(fmt, W, rounding="floor")
    assert torch.equal(scales.group, fmt.scales(W, rounding="floor", tensor=tensor).group)
    assert (scales.tensor is None) == (tensor is None)
    W[3, 3] = torch.nan
    with pytest.raises(UserError, match="weight: 1 of"):
        weight_scales(fmt, W, rounding="floor")
