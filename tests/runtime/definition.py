"""What a quantized linear computes, written out with plain torch and the formats' tables."""

import torch

from stepquant.formats.asym_w4a8 import CODEBOOK
from stepquant.runtime.layout import QuantizationSettings
from stepquant.runtime.linear import W4A4Linear

N, K, R = 6, 128, 4
FORMATS = ("int4", "mxfp4", "nvfp4")
GROUP = {"int4": 64, "mxfp4": 32, "nvfp4": 16, "asym_w4a8": 16, "int8": 64, "mxfp8": 32, "int8_row": K}
EIGHT_BITS = {"int4": "int8", "mxfp4": "mxfp8", "nvfp4": "mxfp8"}
RATIOS = [1.0, 0.8, 0.5]
OFFSETS = [0, -1, 1]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SIGNED_E2M1 = torch.cat((E2M1, -E2M1))
SIGNED_INT4 = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1]).float()
ELEMENTS = {"int4": SIGNED_INT4, "mxfp4": SIGNED_E2M1, "nvfp4": SIGNED_E2M1, "asym_w4a8": torch.tensor(CODEBOOK)}
LARGEST = {"int4": 7, "int8": 127, "mxfp4": 6, "mxfp8": 448}
LARGEST_EXPONENT = {"mxfp4": 2, "mxfp8": 8}
GRID = {
    "int4": torch.arange(-8.0, 8.0),
    "int8": torch.arange(-128.0, 128.0),
    "int8_row": torch.arange(-128.0, 128.0),
    "mxfp4": SIGNED_E2M1,
    "nvfp4": SIGNED_E2M1,
    "mxfp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(torch.inf),
}


def make_linear(
    weight,
    activation,
    rank=R,
    rounding="ceil",
    bias=True,
    mean_subtraction=False,
    rotation=0,
    eight_bit_bins=(),
    scales="absmax",
    hadamard="sylvester",
):
    """A linear of three bins with seeded tensors."""
    eight_bits = {}
    if eight_bit_bins:
        eight_bits = {"eight_bit_format": EIGHT_BITS[activation], "eight_bit_bins": {"a": eight_bit_bins}}
    settings = QuantizationSettings(
        weight,
        activation,
        rounding,
        scales,
        rank,
        mean_subtraction,
        {},
        (1000.0, 900.0, 600.0, 0.0),
        ("a",),
        **eight_bits,
        hadamard=hadamard,
    )
    linear = W4A4Linear(K, N, bias, settings, device="cpu", rotation=rotation, eight_bit_bins=eight_bit_bins)
    g = torch.Generator().manual_seed(1)
    linear.qweight.copy_(torch.randint(-128, 128, (N, K // 2), generator=g))
    if weight == "int4":
        linear.wscales.copy_(0.01 + 0.02 * torch.rand(K // 64, N, generator=g))
    elif weight == "mxfp4":
        linear.wscales.copy_(torch.randint(118, 124, (K // 32, N), generator=g))
    elif weight == "nvfp4":
        linear.wscales.copy_(1 + 400 * torch.rand(K // 16, N, generator=g))
        linear.wtscale.copy_(torch.tensor([1e-4]))
        linear.wcscales.copy_(0.5 + torch.rand(N, generator=g))
    else:
        linear.wscales.copy_(20 + 120 * torch.rand(K // 16, N, generator=g))
        linear.wcscales.copy_(0.001 + 0.002 * torch.rand(N, generator=g))
    linear.smooth_factor.copy_(0.5 + torch.rand(K, generator=g))
    if mean_subtraction:
        linear.mean.copy_(torch.randn(K, generator=g))
    if rank:
        linear.proj_down.copy_(0.1 * torch.randn(K, rank, generator=g))
        linear.proj_up.copy_(0.1 * torch.randn(N, rank, generator=g))
    if activation:
        linear.clip_ratio.copy_(torch.tensor(RATIOS))
    if activation == "mxfp4":
        linear.clip_exponent.copy_(torch.tensor(OFFSETS))
    if bias:
        linear.bias.copy_(torch.randn(N, generator=g))
    return linear


def weight_by_hand(linear, fmt):
    """Column by column: even columns are low nibbles, one scale per group of columns, scales stored [K/G, N]."""
    table = ELEMENTS[fmt]
    W = torch.zeros(N, K)
    for n in range(N):
        for k in range(K):
            byte = int(linear.qweight[n, k // 2]) % 256
            code = byte // 16 if k % 2 else byte % 16
            stored = float(linear.wscales[k // GROUP[fmt], n])
            scale = 2.0 ** (stored - 127) if fmt == "mxfp4" else stored
            if fmt == "nvfp4":
                scale *= float(linear.wtscale) * float(linear.wcscales[n])
            W[n, k] = table[code] * scale
            if fmt == "asym_w4a8":
                W[n, k] = W[n, k].round().clamp(-127, 127) * float(linear.wcscales[n])
    return W


def activation_by_hand(x, fmt, ratio, offset, rounding):
    """Group by group: scale from the clipped absmax, each value to the nearest point of the grid."""
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], GROUP[fmt]):
            group = x[row, start : start + GROUP[fmt]]
            amax = group.abs().max() * ratio
            if fmt in ("int4", "int8"):
                scale = (amax / LARGEST[fmt]).bfloat16().float()
            elif fmt == "int8_row":
                scale = amax / 127
            elif fmt == "nvfp4":
                scale = (amax / 6).to(torch.float8_e4m3fn).float()
            elif rounding == "floor":
                scale = 2.0 ** (torch.floor(torch.log2(amax)) - LARGEST_EXPONENT[fmt] + offset)
            else:
                scale = 2.0 ** (torch.ceil(torch.log2(amax / LARGEST[fmt])) + offset)
            grid = GRID[fmt]
            nearest = (group[:, None] / scale - grid).abs().argmin(1)
            out[row, start : start + GROUP[fmt]] = grid[nearest] * scale
    return out
