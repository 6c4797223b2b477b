"""mxfp4 against torchao's MXTensor: E8M0 scales, packed codes and decoded values, bit for bit."""

import pytest
import torch
from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

from stepquant.errors import UserError
from stepquant.formats import get_format, pack_nibbles

from .inputs import MAGNITUDES, heavy_tailed

MXFP4 = get_format("mxfp4")
MODES = {"floor": ScaleCalculationMode.FLOOR, "ceil": ScaleCalculationMode.RCEIL}
GROUP = 32


def group_of(value: float) -> torch.Tensor:
    """One group [1, 32] whose largest magnitude is value."""
    x = torch.zeros(1, GROUP)
    x[0, 3] = value
    return x


def exponent(x: torch.Tensor, **how) -> int:
    """The unbiased exponent of x's only group."""
    return MXFP4.scales(x, **how).group.item() - 127


def assert_equals_torchao(x, rounding):
    theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, GROUP, MODES[rounding])
    scales = MXFP4.scales(x, rounding=rounding)
    codes = MXFP4.encode(x, scales)
    assert scales.group.dtype == torch.uint8
    assert torch.equal(scales.group, theirs.scale.view(torch.uint8))
    assert torch.equal(pack_nibbles(codes), theirs.qdata)
    assert torch.equal(MXFP4.decode(codes, scales), theirs.dequantize(torch.float32))
    assert torch.equal(MXFP4.fake_quantize(x, rounding=rounding), theirs.dequantize(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", MAGNITUDES.values(), ids=MAGNITUDES.keys())
@pytest.mark.parametrize("rounding", MODES)
def test_equals_torchao(scale, dtype, rounding):
    assert_equals_torchao(heavy_tailed(scale, dtype), rounding)


@pytest.mark.parametrize("rounding", MODES)
def test_zeros_equal_torchao(rounding):
    assert_equals_torchao(torch.zeros(2, 64), rounding)


@pytest.mark.parametrize("power", [-90, -3, 0, 5, 100])
def test_exponents_at_and_next_to_powers_of_two(power):
    unit = 2.0**power
    just_below_8, just_above_6 = (
        torch.nextafter(torch.tensor(v * unit), torch.tensor(t)).item() for v, t in ((8, 0.0), (6, torch.inf))
    )
    # floor: 4 <= amax < 8 have the same exponent, with scale 1.
    assert exponent(group_of(4 * unit), rounding="floor") == power
    assert exponent(group_of(just_below_8), rounding="floor") == power
    assert exponent(group_of(8 * unit), rounding="floor") == power + 1
    # ceil: 3 < amax <= 6 have it.
    assert exponent(group_of(3 * unit), rounding="ceil") == power - 1
    assert exponent(group_of(6 * unit), rounding="ceil") == power
    assert exponent(group_of(just_above_6), rounding="ceil") == power + 1


def test_ceil_is_exact_where_torchao_takes_a_rounded_logarithm():
    """amax is the float32 next above 6 * 2^5, so log2(amax / 6) is above 5 and its ceiling is 6.

    torchao computes log2 in float32, gets 5 and lets the value saturate; NVIDIA's cvt.rp.ue8m0 rounds up, as we do.
    """
    x = group_of(torch.nextafter(torch.tensor(6 * 32.0), torch.tensor(torch.inf)).item())
    assert exponent(x, rounding="ceil") == 6
    theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, GROUP, ScaleCalculationMode.RCEIL)
    assert theirs.scale.view(torch.uint8).item() - 127 == 5


def test_floor_saturates_and_ceil_does_not():
    x = group_of(7.5)
    # floor: scale 2^0, 7.5 saturates at 6. ceil: scale 2^1, 7.5 / 2 = 3.75 rounds to 4, which is 8.
    assert MXFP4.fake_quantize(x, rounding="floor")[0, 3] == 6.0
    assert MXFP4.fake_quantize(x, rounding="ceil")[0, 3] == 8.0


def test_clip_and_offset_move_the_exponent():
    x = group_of(6.0)
    assert exponent(x) == 0
    assert exponent(x, clip=0.5) == -1  # ceil(log2(3 / 6))
    assert exponent(x, clip=0.6) == 0  # ceil(log2(3.6 / 6))
    assert exponent(x, exponent_offset=1) == 1
    assert exponent(x, exponent_offset=-2) == -2


def test_clip_and_offset_per_group():
    x = torch.cat((group_of(6.0), group_of(6.0)), dim=1)
    scales = MXFP4.scales(x, clip=torch.tensor([1.0, 0.5]), exponent_offset=torch.tensor([2, 0]))
    assert (scales.group.int() - 127).tolist() == [[2, -1]]


def test_exponent_stays_in_range():
    assert MXFP4.scales(group_of(1e38), exponent_offset=9).group.item() == 253
    assert MXFP4.scales(group_of(1e-38), exponent_offset=-9).group.item() == 0


def test_smallest_scale_decodes():
    """e = 0 is 2^-127, subnormal in float32: the only exponent that is not copied into a float's exponent field."""
    x = group_of(6 * 2.0**-127)
    scales = MXFP4.scales(x)
    assert scales.group.item() == 0
    assert torch.equal(MXFP4.decode(MXFP4.encode(x, scales), scales), x)


def test_unknown_rounding_is_refused():
    with pytest.raises(UserError, match="'nearest'; allowed: 'floor', 'ceil'"):
        MXFP4.scales(group_of(1.0), rounding="nearest")


def test_tensor_scale_is_refused():
    with pytest.raises(UserError, match="mxfp4 has none"):
        MXFP4.scales(group_of(1.0), tensor=torch.tensor(1.0))
