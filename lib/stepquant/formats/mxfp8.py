"""mxfp8: E4M3 elements, one power-of-two scale per 32 values (OCP Microscaling Formats 1.0, section 6.3).

For activations beside mxfp4 and nvfp4.

Storage contract of x [..., K]:
    codes   uint8 [..., K]      the byte of a float8_e4m3fn (section 5.3.1 of the specification): sign (bit 7), exponent
                                (bits 6..3, bias 7), mantissa (bits 2..0); -448..448, subnormal below 2^-6
    scales  uint8 [..., K/32]   E8M0, see e8m0.py: byte e is 2^(e - 127)
    x = value(code) * 2^(e - 127)

e8m0.py has the two rules of the scale. With "floor", magnitudes in (448, 512) * scale saturate at 448.
"""

import torch
from torch import Tensor

from stepquant.formats.base import Format, Scales
from stepquant.formats.e8m0 import e8m0_reciprocal, e8m0_scales, e8m0_value
from stepquant.formats.round_float import round_float

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
_MANTISSA_BITS = 3
_SMALLEST_EXPONENT = -6


class Mxfp8(Format):
    """E4M3 elements with an E8M0 scale per group; the header of this file states the layout."""

    name = "mxfp8"
    group = 32
    code_bits = 8
    bits = 8 + 8 / 32
    scale_dtype = torch.uint8  # E8M0
    has_exponent_scale = True

    def tensor_scale(self, x: Tensor) -> None:
        """None: mxfp8 has no per-tensor scale."""
        return None

    def round_to_grid(self, y: Tensor, scale: Tensor) -> Tensor:
        """y rounded in place to E4M3, by float32 arithmetic: kernels of older GPUs have no cast to float8."""
        return round_float(y, E4M3_MAX, _MANTISSA_BITS, _SMALLEST_EXPONENT)

    def encode_scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        """Bytes of y as float8_e4m3fn; overwrites y."""
        return y.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)

    def _from_codes(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def _scales(self, amax: Tensor, exponent_offset: int | Tensor, rounding: str, tensor: Tensor | None) -> Scales:
        return Scales(e8m0_scales(amax, E4M3_MAX, exponent_offset, rounding), None)

    def _scale(self, scales: Scales) -> Tensor:
        return e8m0_value(scales.group).unsqueeze(-1)

    def _reciprocal(self, scales: Scales) -> Tensor:
        return e8m0_reciprocal(scales.group)
