"""Activation scales by error against a search over both scales of every group, written out in plain Python."""

import pytest
import torch

from stepquant.errors import UserError
from stepquant.formats import get_format
from stepquant.quantize.activation_scales import check_scale_rule, fake_quantize_activation
from stepquant.quantize.quantized_layer import QuantScheme, rounding_noise
from stepquant.quantize.transform import InputTransform

NVFP4 = get_format("nvfp4")
E2M1 = torch.tensor([s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], dtype=torch.float64)
UNCLIPPED = {"clip": 1.0, "exponent_offset": 0, "rounding": "ceil"}


def by_hand(z, clip=1.0):
    """Of each group of 16 the rounding with the smaller squared error, of absmax / 6 and absmax / 4 in E4M3."""
    out = torch.zeros_like(z)
    for row in range(len(z)):
        for start in range(0, z.shape[1], 16):
            group, rounded = z[row, start : start + 16], []
            for largest in (6, 4):
                scale = (group.abs().max() * clip / largest).clamp(2**-6, 448).to(torch.float8_e4m3fn).double()
                nearest = E2M1[(group.double()[:, None] / scale - E2M1).abs().argmin(1)] * scale
                rounded.append((((nearest - group) ** 2).sum().item(), largest, nearest))
            out[row, start : start + 16] = min(rounded, key=lambda candidate: candidate[0])[2]
    return out


@pytest.mark.parametrize("clip", [1.0, 0.85])
@pytest.mark.parametrize("magnitude", [0.02, 1.0, 3000.0], ids=["small", "usual", "beyond E4M3"])
def test_every_group_has_the_better_of_two_scales(magnitude, clip):
    z = magnitude * torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) ** 3
    found = fake_quantize_activation(z, NVFP4, "error", clip=clip, exponent_offset=0, rounding="ceil")
    torch.testing.assert_close(found, by_hand(z, clip), rtol=1e-6, atol=0)


def test_both_scales_occur():
    # 6 and 4.5: with scale 1 the latter is in the gap between 4 and 6, with scale 1.5 they are the elements 4 and 3.
    # 6 and 5 elements of 0.5 above it: scale 1 holds all, with scale 1.5 (0.75, 1.5 ... 6) 0.5 and 1 are lost.
    z = torch.tensor([[6.0, 4.5] * 8, [6.0, 0.5, 1.0, 2.0] * 4])
    assert torch.equal(fake_quantize_activation(z, NVFP4, "error", **UNCLIPPED), z)
    assert not torch.equal(NVFP4.fake_quantize(z)[0], z[0])


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_absmax_is_the_rounding_of_the_format(name):
    z = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    fmt, clip = get_format(name), torch.tensor([[0.7], [0.8], [0.9], [1.0]])
    found = fake_quantize_activation(z, fmt, "absmax", clip=clip, exponent_offset=0, rounding="floor")
    assert torch.equal(found, fmt.fake_quantize(z, clip=clip, rounding="floor"))


def test_a_clip_per_row():
    z = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    clip = torch.tensor([[1.0], [0.8], [0.5]])
    found = fake_quantize_activation(z, NVFP4, "error", clip=clip, exponent_offset=0, rounding="ceil")
    expected = torch.cat([by_hand(row[None], ratio.item()) for row, ratio in zip(z, clip)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_noise_that_gptq_accounts_for():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)) ** 3
    transform = InputTransform.smoothing(torch.full((64,), 0.5, dtype=torch.bfloat16))
    scheme = QuantScheme(NVFP4, "ceil", NVFP4, "ceil", "error")
    expected = (by_hand(2 * x) - 2 * x).square().mean(0)
    torch.testing.assert_close(rounding_noise([x], transform, scheme), expected, rtol=1e-4, atol=0)


def test_rules_that_are_refused():
    with pytest.raises(UserError, match="activation_scales is 'mse'; allowed: absmax, error"):
        check_scale_rule("mse", "nvfp4", "activation_scales")
    with pytest.raises(UserError, match="is 'error', but activations are mxfp4; allowed: 'absmax', or nvfp4 act"):
        check_scale_rule("error", "mxfp4", "activation_scales")
    check_scale_rule("error", "nvfp4", "activation_scales")
    check_scale_rule("error", None, "activation_scales")
