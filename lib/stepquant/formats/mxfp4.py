"""mxfp4: E2M1 elements, one power-of-two scale per 32 values (OCP Microscaling Formats 1.0, section 6.3).

Storage contract of x [..., K]:
    codes   uint8 [..., K]      E2M1, see e2m1.py
    scales  uint8 [..., K/32]   E8M0: byte e is 2^(e - 127), e in 0..253 (no float32 needs 254; 255 is NaN)
    x = value(code) * 2^(e - 127)

The exponent of a group with largest magnitude amax (clip included):
    "floor"  floor(log2(amax)) - 2       the specification's rule; magnitudes in (6, 8) * scale saturate at 6
    "ceil"   ceil(log2(amax / 6))        nothing saturates
then + exponent_offset, limited to 0..253. A group of zeros has e = 0 before the offset.
"""

import torch
from torch import Tensor

from stepquant.errors import UserError
from stepquant.formats.base import Scales
from stepquant.formats.e2m1 import E2M1_MAX, E2M1Format

_BIAS = 127
_LARGEST = 253


class Mxfp4(E2M1Format):
    """E2M1 elements with an E8M0 scale per group; the header of this file states the layout."""

    name = "mxfp4"
    group = 32
    bits = 4 + 8 / 32
    scale_dtype = torch.uint8  # E8M0
    has_exponent_scale = True

    def tensor_scale(self, x: Tensor) -> None:
        """None: mxfp4 has no per-tensor scale."""
        return None

    def _scales(self, amax: Tensor, exponent_offset: int | Tensor, rounding: str, tensor: Tensor | None) -> Scales:
        if rounding == "floor":
            exponent = _floor_log2(amax) - 2
        elif rounding == "ceil":
            exponent = _ceil_log2(amax / E2M1_MAX)
        else:
            raise UserError(f"rounding of the mxfp4 scale: {rounding!r}; allowed: 'floor', 'ceil'")
        biased = torch.where(amax > 0, exponent + _BIAS, 0) + exponent_offset
        return Scales(biased.clamp(0, _LARGEST).to(torch.uint8), None)

    def _scale(self, scales: Scales) -> Tensor:
        # e is float32's exponent field, except that e = 0 is 2^-127: subnormal, bit 22. (torch.compile lacks E8M0.)
        bits = (scales.group.int() << 23).clamp(min=1 << 22)
        return bits.view(torch.float32).unsqueeze(-1)

    def _reciprocal(self, scales: Scales) -> Tensor:
        # 2^(127 - e), also from its bits: dividing by 2^-127 would fail on devices that flush subnormals to zero.
        return ((2 * _BIAS - scales.group.int()) << 23).view(torch.float32)


def _floor_log2(a: Tensor) -> Tensor:
    """floor(log2(a)) of a > 0 (float32), int32; exact, which log2 in floating point is not."""
    return torch.frexp(a).exponent - 1


def _ceil_log2(a: Tensor) -> Tensor:
    """ceil(log2(a)) of a > 0 (float32), int32; exact."""
    mantissa, exponent = torch.frexp(a)  # a = mantissa * 2^exponent, mantissa in [0.5, 1)
    return exponent - (mantissa == 0.5).int()
