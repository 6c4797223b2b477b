"""int8_row: 8-bit integers with one float32 scale for a whole row (a token); activations only.

The activations of ComfyUI's int8 kernels (comfy-kitchen 0.2.40, `quantize_int8_rowwise`).

Storage contract of x [..., K]:
    codes   uint8 [..., K]      two's complement
    scales  float32 [..., 1]
    x = code * scale

The scale is absmax * clip / 127. A clip below 1 saturates at -128 and 127.
"""

import torch
from torch import Tensor

from stepquant.formats.base import Format, Scales

# comfy-kitchen's; an all-zero row decodes to exact zeros.
_SMALLEST_SCALE = 1e-30


class Int8Row(Format):
    """8-bit integers with a scale per row; the header of this file states the layout."""

    name = "int8_row"
    group = 0
    bits = 8
    scale_dtype = torch.float32
    for_weights = False

    def tensor_scale(self, x: Tensor) -> None:
        """None: a row has one scale."""
        return None

    def round_to_grid(self, y: Tensor, scale: Tensor) -> Tensor:
        """y rounded in place to -128..127."""
        return y.round_().clamp_(-128, 127)

    def encode_scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        """Two's-complement bytes of y; overwrites y."""
        return self.round_to_grid(y, scale).to(torch.int8).view(torch.uint8)

    def _scales(self, amax: Tensor, exponent_offset: int | Tensor, rounding: str, tensor: Tensor | None) -> Scales:
        return Scales((amax / 127).clamp(min=_SMALLEST_SCALE), None)

    def _scale(self, scales: Scales) -> Tensor:
        return scales.group.unsqueeze(-1)

    def _reciprocal(self, scales: Scales) -> Tensor:
        return scales.group.reciprocal()

    def _divide(self, groups: Tensor, scales: Scales) -> Tensor:
        return groups / self._scale(scales)  # not bit for bit the product with the rounded reciprocal

    def _from_codes(self, codes: Tensor) -> Tensor:
        return codes.view(torch.int8).float()
