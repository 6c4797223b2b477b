"""int8 against arithmetic with torch's own rounding and casts, written out per group."""

import pytest
import torch

from stepquant.errors import UserError
from stepquant.formats import get_format

from .inputs import heavy_tailed

INT8 = get_format("int8")
GROUP = 64


def by_hand(x, clip=1.0):
    """Integers (float32), and the scale of every group: absmax * clip / 127 in bfloat16."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1) * clip / 127).bfloat16()
    return torch.round(groups / scale.float().unsqueeze(-1)).clamp(-128, 127), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-30, 1e30])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_codes_scales_and_values(scale, dtype, clip):
    x = heavy_tailed(scale, dtype)[2:]  # rows without all-zero groups
    integers, expected = by_hand(x, clip)
    scales = INT8.scales(x, clip=clip)
    assert torch.equal(scales.group, expected)
    codes = INT8.encode(x, scales)
    assert torch.equal(codes, (integers.flatten(-2) % 256).to(torch.uint8))  # two's complement: modulo 256
    values = (integers * expected.float().unsqueeze(-1)).flatten(-2)
    assert torch.equal(INT8.decode(codes, scales), values)
    assert torch.equal(INT8.fake_quantize(x, clip=clip), values.to(dtype))


def test_numbers_by_hand():
    """absmax 254 gives scale 2: 254 / 2 = 127, 5 / 2 = 2.5 to the even 2, -7 / 2 = -3.5 to the even -4."""
    x = torch.zeros(1, GROUP)
    x[0, :4] = torch.tensor([254.0, 5.0, -7.0, -254.0])
    scales = INT8.scales(x)
    assert scales.group.item() == 2.0
    assert INT8.encode(x, scales)[0, :5].tolist() == [127, 2, 256 - 4, 256 - 127, 0]
    assert INT8.fake_quantize(x)[0, :5].tolist() == [254.0, 4.0, -8.0, -254.0, 0.0]


def test_minus_128_needs_a_clip():
    """With clip 1/2 the scale is 1: 254 saturates at 127, -254 at -128."""
    x = torch.zeros(1, GROUP)
    x[0, :2] = torch.tensor([254.0, -254.0])
    assert INT8.fake_quantize(x, clip=0.5)[0, :2].tolist() == [127.0, -128.0]
    assert INT8.encode(heavy_tailed(1.0), INT8.scales(heavy_tailed(1.0))).ne(128).all()


def test_all_codes_decode_to_twos_complement():
    codes = torch.arange(256, dtype=torch.uint8)[None]
    scales = INT8.scales(torch.full((1, 256), 127.0))
    assert INT8.decode(codes, scales)[0].tolist() == [*range(128), *range(-128, 0)]


def test_zero_groups_decode_to_zeros_with_a_finite_scale():
    x = torch.zeros(3, 2 * GROUP)
    scales = INT8.scales(x)
    assert torch.isfinite(scales.group).all() and (scales.group > 0).all()
    assert torch.equal(INT8.decode(INT8.encode(x, scales), scales), x)


@pytest.mark.parametrize("argument", [{"exponent_offset": 1}, {"tensor": torch.tensor(1.0)}])
def test_arguments_of_other_formats_are_refused(argument):
    with pytest.raises(UserError, match="int8 has no|int8 has none"):
        INT8.scales(torch.ones(1, GROUP), **argument)
