"""Formats on a device: scales, codes and values are the CPU's to the bit, on CUDA too, since nothing is summed."""

import pytest
import torch

from stepquant.errors import UserError
from stepquant.formats import check_finite, get_format, pack_nibbles, unpack_nibbles, weight_scales
from tests.formats.inputs import heavy_tailed


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4", "int8", "mxfp8"])
def test_scales_codes_and_values(device, name):
    fmt, W = get_format(name), heavy_tailed(1.0)
    expected, found = weight_scales(fmt, W, rounding="ceil"), weight_scales(fmt, W.to(device), rounding="ceil")
    codes = fmt.encode(W.to(device), found)
    stored = unpack_nibbles(pack_nibbles(codes)) if fmt.code_bits == 4 else codes
    pairs = [
        (found.group.float(), expected.group.float()),
        (stored, fmt.encode(W, expected)),
        (fmt.decode(codes, found), fmt.decode(fmt.encode(W, expected), expected)),
        (fmt.fake_quantize(W.to(device), clip=0.8), fmt.fake_quantize(W, clip=0.8)),
        (fmt.fake_quantize(W.to(device), clip=torch.tensor([0.8], device=device)), fmt.fake_quantize(W, clip=0.8)),
    ]
    for there, here in pairs:
        assert there.device == torch.ones(1, device=device).device
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=0)


def test_a_nan_is_named_from_the_device(device):
    W = heavy_tailed(1.0)
    W[2, 5] = float("nan")
    with pytest.raises(UserError, match=r"the first at index \(2, 5\)"):
        check_finite(W.to(device), "weight")
