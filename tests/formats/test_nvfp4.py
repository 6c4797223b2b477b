"""nvfp4 against torchao's NVFP4Tensor: scales, packed codes and decoded values, bit for bit."""

import pytest
import torch
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

from stepquant.errors import UserError
from stepquant.formats import get_format, nvfp4_tensor_scale, pack_nibbles

from .inputs import MAGNITUDES, heavy_tailed

NVFP4 = get_format("nvfp4")
DTYPES = [torch.float32, torch.bfloat16]


def assert_equals_torchao(x, tensor):
    theirs = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=tensor)
    scales = NVFP4.scales(x, tensor=tensor)
    codes = NVFP4.encode(x, scales)
    assert scales.group.dtype == torch.float8_e4m3fn
    assert torch.equal(scales.group.view(torch.uint8), theirs.scale.view(torch.uint8))
    assert torch.equal(pack_nibbles(codes), theirs.qdata)
    assert torch.equal(NVFP4.decode(codes, scales), theirs.dequantize(torch.float32))
    assert torch.equal(NVFP4.fake_quantize(x, tensor=tensor), theirs.dequantize(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", MAGNITUDES.values(), ids=MAGNITUDES.keys())
@pytest.mark.parametrize("two_level", [False, True])
def test_equals_torchao(scale, dtype, two_level):
    x = heavy_tailed(scale, dtype)
    assert_equals_torchao(x, nvfp4_tensor_scale(x) if two_level else None)


@pytest.mark.parametrize("tensor", [None, torch.tensor(1.0), torch.tensor(0.25)])
def test_zeros_equal_torchao(tensor):
    assert_equals_torchao(torch.zeros(2, 64), tensor)


def test_any_number_of_leading_dimensions():
    x = heavy_tailed(1.0)
    flat = NVFP4.fake_quantize(x)
    assert torch.equal(NVFP4.fake_quantize(x.view(2, 3, 8, 512)), flat.view(2, 3, 8, 512))
    assert torch.equal(NVFP4.fake_quantize(x[5]), flat[5])


def test_clip_multiplies_the_largest_magnitude():
    x = torch.zeros(1, 16)
    x[0, 0] = 12.0
    # 12 * 0.5 / 6 = 1: the group decodes in units of 1 and 12 saturates at 6.
    scales = NVFP4.scales(x, clip=0.5)
    assert scales.group.float().item() == 1.0
    assert NVFP4.decode(NVFP4.encode(x, scales), scales)[0, 0] == 6.0


def test_scale_saturates_at_448_and_stays_normal():
    x = torch.zeros(2, 16)
    x[0, 0], x[1, 0] = 6 * 1000.0, 6 * 2.0**-8
    assert NVFP4.scales(x).group.float().flatten().tolist() == [448.0, 2.0**-6]


def test_tensor_scale():
    # 6 * 448 = 2688, and 2688 * 1.0078125 = 2709 with 1.0078125 = 1 + 2^-7 a bfloat16
    assert nvfp4_tensor_scale(torch.tensor([3.0, -2709.0])).item() == 1.0078125
    # 2700 / 2688 = 1.00446 is nearer to 1.0078125 (0.0033 away) than to 1 (0.0045 away)
    assert nvfp4_tensor_scale(torch.tensor([[2700.0]])).item() == 1.0078125
    assert nvfp4_tensor_scale(torch.zeros(4, 4)).item() == 1.0
    scale = nvfp4_tensor_scale(torch.ones(2, dtype=torch.bfloat16))
    assert scale.dtype == torch.float32 and scale.shape == ()


def test_smallest_floats_stay_finite():
    """The tensor scale never falls below 2^-121: 2^121 / 2^-6 = 2^127 is the largest reciprocal float32 holds."""
    x = torch.full((1, 16), 1e-40)
    tensor = nvfp4_tensor_scale(x)
    assert tensor.item() == 2.0**-121
    assert torch.equal(NVFP4.fake_quantize(x, tensor=tensor), torch.zeros(1, 16))


def test_exponent_offset_is_refused():
    with pytest.raises(UserError, match="exponent offset 1: nvfp4"):
        NVFP4.scales(torch.ones(1, 16), exponent_offset=1)
