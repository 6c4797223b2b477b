"""mxfp8 against torchao's MXTensor and torch's own cast to float8_e4m3fn, bit for bit."""

import pytest
import torch
from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

from stepquant.errors import UserError
from stepquant.formats import get_format

from .inputs import MAGNITUDES, heavy_tailed, midpoints

MXFP8 = get_format("mxfp8")
MODES = {"floor": ScaleCalculationMode.FLOOR, "ceil": ScaleCalculationMode.RCEIL}
GROUP = 32
ONE = torch.ones(1)  # the scale of values that are divided by theirs already
# Every finite value: codes 0..126 are positive, 127 is NaN, and so on with the sign bit.
POSITIVE = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def group_of(value: float) -> torch.Tensor:
    """One group [1, 32] whose largest magnitude is value."""
    x = torch.zeros(1, GROUP)
    x[0, 3] = value
    return x


def exponent(x: torch.Tensor, **how) -> int:
    """The unbiased exponent of x's only group."""
    return MXFP8.scales(x, **how).group.item() - 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", MAGNITUDES.values(), ids=MAGNITUDES.keys())
@pytest.mark.parametrize("rounding", MODES)
def test_equals_torchao(scale, dtype, rounding):
    x = heavy_tailed(scale, dtype)
    theirs = MXTensor.to_mx(x, torch.float8_e4m3fn, GROUP, MODES[rounding])
    scales = MXFP8.scales(x, rounding=rounding)
    codes = MXFP8.encode(x, scales)
    assert scales.group.dtype == torch.uint8
    assert torch.equal(scales.group, theirs.scale.view(torch.uint8))
    assert torch.equal(codes, theirs.qdata.view(torch.uint8))
    assert torch.equal(MXFP8.decode(codes, scales), theirs.dequantize(torch.float32))
    assert torch.equal(MXFP8.fake_quantize(x, rounding=rounding), theirs.dequantize(x.dtype))


def test_rounds_like_torchs_cast_around_every_midpoint_and_everywhere_else():
    spread = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 2.5, 20_000)
    y = torch.cat((POSITIVE, midpoints(POSITIVE.tolist()), spread, torch.tensor([1e-45, 1e-38, 447.9, 448.1])))
    y = torch.cat((y, -y))
    expected = y.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(MXFP8.round_to_grid(y.clone(), ONE), expected.float())
    assert torch.equal(MXFP8.encode_scaled(y.clone(), ONE), expected.view(torch.uint8))


def test_saturates_at_448():
    beyond = torch.tensor([448.0, 464.0, 480.0, 1e30, torch.inf])  # torch's cast makes NaN of what is above 464
    assert MXFP8.round_to_grid(beyond.clone(), ONE).tolist() == [448.0] * 5
    assert MXFP8.encode_scaled(-beyond, ONE).tolist() == [0xFE] * 5  # sign, exponent 15, mantissa 6: -1.75 * 2^8


@pytest.mark.parametrize("power", [-90, -3, 0, 5, 100])
def test_exponents_at_and_next_to_powers_of_two(power):
    unit = 2.0**power
    just_below_512, just_above_448 = (
        torch.nextafter(torch.tensor(v * unit), torch.tensor(t)).item() for v, t in ((512, 0.0), (448, torch.inf))
    )
    # floor: 256 <= amax < 512 have the same exponent, with scale 1.
    assert exponent(group_of(256 * unit), rounding="floor") == power
    assert exponent(group_of(just_below_512), rounding="floor") == power
    assert exponent(group_of(512 * unit), rounding="floor") == power + 1
    # ceil: 224 < amax <= 448 have it.
    assert exponent(group_of(224 * unit), rounding="ceil") == power - 1
    assert exponent(group_of(448 * unit), rounding="ceil") == power
    assert exponent(group_of(just_above_448), rounding="ceil") == power + 1


def test_floor_saturates_and_ceil_does_not():
    x = group_of(500.0)
    assert MXFP8.fake_quantize(x, rounding="floor")[0, 3] == 448.0
    # ceil: scale 2; 250 lies between 240 and 256, and both are codes: 250 / 2^7 = 1.953, eighths: 15.6 -> 16 -> 256.
    assert MXFP8.fake_quantize(x, rounding="ceil")[0, 3] == 512.0


def test_exponent_stays_in_range():
    assert MXFP8.scales(group_of(1e38), exponent_offset=99).group.item() == 253
    assert MXFP8.scales(group_of(1e-38)).group.item() == 0
    assert MXFP8.scales(torch.zeros(1, GROUP)).group.item() == 0


def test_smallest_scale_decodes():
    """e = 0 is 2^-127, subnormal in float32: the only exponent that is not copied into a float's exponent field."""
    x = group_of(448 * 2.0**-127)
    scales = MXFP8.scales(x)
    assert scales.group.item() == 0
    assert torch.equal(MXFP8.decode(MXFP8.encode(x, scales), scales), x)


def test_wrong_options_are_refused():
    with pytest.raises(UserError, match="'nearest'; allowed: 'floor', 'ceil'"):
        MXFP8.scales(group_of(1.0), rounding="nearest")
    with pytest.raises(UserError, match="mxfp8 has none"):
        MXFP8.scales(group_of(1.0), tensor=torch.tensor(1.0))
