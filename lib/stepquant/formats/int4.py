"""int4: signed integers, one bfloat16 scale per 64 values.

Storage contract of x [..., K]:
    codes   uint8 [..., K]      two's-complement nibble: 0..7 are 0..7, 8..15 are -8..-1
    scales  bfloat16 [..., K/64]
    x = code * scale

The scale is absmax * clip / 7 (SVDQuant, arXiv 2411.05007, section 3, symmetric with q_max = 7). It is rounded to
bfloat16 before any value is divided by it, so encoding and decoding use the same number. The code -8 occurs only when
a clip below 1 makes a value saturate there.
"""

import torch
from torch import Tensor

from stepquant.formats.base import Format, Scales

# A scale of zero would divide zero by zero; the smallest normal number decodes an all-zero group to exact zeros.
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny


class Int4(Format):
    """Symmetric 4-bit integers with a bfloat16 scale per group; the header of this file states the layout."""

    name = "int4"
    group = 64
    bits = 4 + 16 / 64
    scale_dtype = torch.bfloat16

    def tensor_scale(self, x: Tensor) -> None:
        """None: int4 has no per-tensor scale."""
        return None

    def round_to_grid(self, y: Tensor, scale: Tensor) -> Tensor:
        """y rounded in place to -8..7."""
        return y.round_().clamp_(-8, 7)

    def encode_scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        """Two's-complement nibbles of y; overwrites y."""
        return self.round_to_grid(y, scale).to(torch.int8).view(torch.uint8) & 0x0F

    def _scales(self, amax: Tensor, exponent_offset: int | Tensor, rounding: str, tensor: Tensor | None) -> Scales:
        return Scales(_to_bfloat16((amax / 7).clamp(min=_SMALLEST_SCALE)), None)

    def _scale(self, scales: Scales) -> Tensor:
        return scales.group.float().unsqueeze(-1)

    def _reciprocal(self, scales: Scales) -> Tensor:
        return scales.group.float().reciprocal()

    def _divide(self, groups: Tensor, scales: Scales) -> Tensor:
        return groups / self._scale(scales)  # not bit for bit the product with the rounded reciprocal

    def _from_codes(self, codes: Tensor) -> Tensor:
        # Flipping the sign bit maps the nibble's order 0..7, -8..-1 to 8..15, 0..7, which is the value plus eight.
        return (codes ^ 8).float().sub_(8)


def _to_bfloat16(a: Tensor) -> Tensor:
    """a (float32) rounded to bfloat16, to nearest even, in integers: torch.compile may drop a cast that it fuses."""
    bits = a.view(torch.int32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & ~0xFFFF
    return rounded.view(torch.float32).bfloat16()
