"""int4 against comfy_kitchen's eager SVDQuant quantizer."""

import pytest
import torch
from comfy_kitchen.backends.eager.svdquant import _unpack_int4_row_major, quantize_svdquant_w4a4

from stepquant.errors import UserError
from stepquant.formats import get_format, pack_nibbles

from .inputs import heavy_tailed, midpoints

INT4 = get_format("int4")
GROUP = 64


def comfy(x):
    """comfy_kitchen's packed codes (uint8 [M, K/2]) and scales [M, K/64] of x [M, K], unsmoothed, no low rank."""
    K = x.shape[1]
    smooth, down = torch.ones(K, dtype=x.dtype), torch.zeros(K, 1, dtype=x.dtype)
    packed, scales, _ = quantize_svdquant_w4a4(x, smooth, down, pad_size=1)
    return packed.view(torch.uint8), scales.t()


def with_representable_scales(scale: float) -> torch.Tensor:
    """Random x whose absmax / 7 is a bfloat16 in every group, so that float32 scales need no rounding.

    comfy_kitchen divides by its float32 scale; ours is rounded to bfloat16 first. Here both are equal.
    """
    x = heavy_tailed(scale).unflatten(-1, (-1, GROUP))
    step = (x.abs().amax(-1) / 7 * 1.01).bfloat16().float()
    x[..., 5] = 7 * step  # 8 bits times 3 bits: exact in float32
    return x.flatten(-2)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e30])
def test_equals_comfy_kitchen(scale):
    x = with_representable_scales(scale)
    x = x[2:]  # rows without all-zero groups, whose scale differs, see below
    scales = INT4.scales(x)
    packed, theirs = comfy(x)
    assert scales.group.dtype == torch.bfloat16
    assert torch.equal(scales.group.float(), theirs)
    assert torch.equal(pack_nibbles(INT4.encode(x, scales)), packed)


def test_bfloat16_scales_equal_comfy_kitchen_and_codes_differ_only_where_its_quotient_is_rounded():
    """For bfloat16 x, comfy_kitchen rounds x / scale to bfloat16 before rounding to an integer: twice. We round once.

    A quotient close to a half can become the half. Everywhere else the codes are the same.
    """
    x = heavy_tailed(1.0, torch.bfloat16)[2:]
    scales = INT4.scales(x)
    packed, theirs = comfy(x)
    assert torch.equal(scales.group, theirs)
    quotient = (x.float().unflatten(-1, (-1, GROUP)) / scales.group.float().unsqueeze(-1)).flatten(-2)
    half_after_rounding = quotient.bfloat16().float().frac().abs() == 0.5
    codes = _unpack_int4_row_major(pack_nibbles(INT4.encode(x, scales)))
    same = codes == _unpack_int4_row_major(packed)
    assert same[~half_after_rounding].all() and not same.all()
    assert torch.equal(codes.float(), quotient.round())


def test_tiny_groups_keep_their_values_where_comfy_kitchen_flushes_them():
    """comfy_kitchen raises absmax to 1e-10, so 7e-30 has code 0; ours has scale 1e-30 (bfloat16) and code 7."""
    x = torch.zeros(1, GROUP)
    x[0, 0], x[0, 1] = 7e-30, -3e-30
    scales = INT4.scales(x)
    assert scales.group.item() == torch.tensor(1e-30).bfloat16().item()
    assert INT4.encode(x, scales)[0, :3].tolist() == [7, 16 - 3, 0]
    assert not comfy(x)[0].any()


def test_zero_groups_decode_to_zeros_with_a_finite_scale():
    x = torch.zeros(3, 2 * GROUP)
    scales = INT4.scales(x)
    assert torch.isfinite(scales.group).all() and (scales.group > 0).all()
    assert torch.equal(INT4.decode(INT4.encode(x, scales), scales), x)
    assert torch.equal(comfy(x)[0], pack_nibbles(INT4.encode(x, scales)))


def test_all_codes_decode_to_twos_complement():
    codes = torch.arange(16, dtype=torch.uint8).repeat(4)[None]
    scales = INT4.scales(torch.full((1, GROUP), 7.0))  # 7 / 7 = 1
    expected = [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]
    assert INT4.decode(codes, scales)[0, :16].tolist() == expected


def test_ties_to_even_and_saturation():
    ones = INT4.scales(torch.full((1, GROUP), 7.0))
    x = torch.zeros(1, GROUP)
    x[0, :10] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -7.5, 7.4, 7.5, 100.0, -100.0])
    assert INT4.decode(INT4.encode(x, ones), ones)[0, :10].tolist() == [0, 2, 2, 0, -2, -8, 7, 7, 7, -8]


def test_scale_rounds_to_bfloat16_like_torch():
    """The scale is rounded with integer arithmetic; torch's own cast decides, midpoints included."""
    grid = torch.arange(0x3F80, 0x4080, dtype=torch.int32)
    bfloat16s = (grid << 16).view(torch.float32).tolist()
    wanted = torch.cat((midpoints(bfloat16s), torch.logspace(-37, 37, 300)))
    x = torch.zeros(len(wanted), GROUP)
    x[:, 0] = wanted * 7
    assert torch.equal(INT4.scales(x).group, (x[:, :1] / 7).bfloat16())


def test_clip_scales_and_saturates():
    x = torch.zeros(2, GROUP)
    x[:, 0], x[:, 1] = 14.0, -14.0
    scales = INT4.scales(x, clip=torch.tensor([[1.0], [0.5]]))
    assert scales.group.flatten().tolist() == [2.0, 1.0]
    assert INT4.decode(INT4.encode(x, scales), scales)[:, :2].tolist() == [[14.0, -14.0], [7.0, -8.0]]


@pytest.mark.parametrize("argument", [{"exponent_offset": 1}, {"tensor": torch.tensor(1.0)}])
def test_arguments_of_other_formats_are_refused(argument):
    with pytest.raises(UserError, match="int4 has no"):
        INT4.scales(torch.ones(1, GROUP), **argument)
