"""int4: signed integers, one bfloat16 scale per 64 values.

Storage contract of x [..., K]:
    codes   uint8 [..., K]      two's-complement nibble: 0..7 are 0..7, 8..15 are -8..-1
    scales  bfloat16 [..., K/64]
    x = code * scale

The scale is absmax * clip / 7 (SVDQuant, arXiv 2411.05007, section 3, symmetric with q_max = 7), rounded to bfloat16
before any value is divided by it, so that what is encoded is what will be decoded. -8 is emitted only when a clip
below 1 pushes a value there.
"""

import torch
from torch import Tensor

from stepquant.formats.base import Format, Scales, check_no_offset, check_no_tensor_scale

# A scale of zero would divide zero by zero; the smallest normal number decodes an all-zero group to exact zeros.
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny


class Int4(Format):
    name = "int4"
    group = 64
    bits = 4 + 16 / 64
    scale_dtype = torch.bfloat16

    def scales(self, x, *, clip=1.0, exponent_offset=0, rounding="ceil", tensor=None, amax=None) -> Scales:
        check_no_offset(self, exponent_offset)
        check_no_tensor_scale(self, tensor)
        scale = ((self.amax(x) if amax is None else amax) * clip / 7).clamp(min=_SMALLEST_SCALE)
        return Scales(_to_bfloat16(scale), None)

    def tensor_scale(self, x: Tensor) -> None:
        return None

    def _scale(self, scales: Scales) -> Tensor:
        return scales.group.float().unsqueeze(-1)

    def _reciprocal(self, scales: Scales) -> Tensor:
        return scales.group.float().reciprocal()

    def _divide(self, groups: Tensor, scales: Scales) -> Tensor:
        return groups / self._scale(scales)  # which a product with the rounded inverse is not, bit for bit

    def round_to_grid(self, y: Tensor) -> Tensor:
        return y.round_().clamp_(-8, 7)

    def encode_scaled(self, y: Tensor) -> Tensor:
        return self.round_to_grid(y).to(torch.int8).view(torch.uint8) & 0x0F

    def _from_codes(self, codes: Tensor) -> Tensor:
        # Flipping the sign bit maps the nibble's order 0..7, -8..-1 to 8..15, 0..7, eight above its value.
        return (codes ^ 8).float().sub_(8)


def _to_bfloat16(a: Tensor) -> Tensor:
    """a (float32) rounded to bfloat16, to nearest even, in integers: torch.compile may drop a cast it fuses."""
    bits = a.view(torch.int32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & ~0xFFFF
    return rounded.view(torch.float32).bfloat16()
