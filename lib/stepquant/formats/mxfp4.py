"""mxfp4: E2M1 elements, one power-of-two scale per 32 values (OCP Microscaling Formats 1.0, section 6.3).

Storage contract of x [..., K]:
    codes   uint8 [..., K]      E2M1, see e2m1.py
    scales  uint8 [..., K/32]   E8M0, see e8m0.py: byte e is 2^(e - 127)
    x = value(code) * 2^(e - 127)

e8m0.py has the two rules of the scale. With "floor", magnitudes in (6, 8) * scale saturate at 6.
"""

import torch
from torch import Tensor

from stepquant.formats.base import Scales
from stepquant.formats.e2m1 import E2M1_MAX, E2M1Format
from stepquant.formats.e8m0 import e8m0_reciprocal, e8m0_scales, e8m0_value


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
        return Scales(e8m0_scales(amax, E2M1_MAX, exponent_offset, rounding), None)

    def _scale(self, scales: Scales) -> Tensor:
        return e8m0_value(scales.group).unsqueeze(-1)

    def _reciprocal(self, scales: Scales) -> Tensor:
        return e8m0_reciprocal(scales.group)
