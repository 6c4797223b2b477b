"""int8 and int8_row: signed 8-bit integers for activations, one scale per 64 values or per row.

Storage contract of x [..., K]:
    codes   uint8 [..., K]      two's complement: 0..127 are 0..127, 128..255 are -128..-1
    scales  int8: bfloat16 [..., K/64]; int8_row: float32 [..., 1], one for a whole row (a token)
    x = code * scale

The scale is absmax * clip / 127, see integer.py. The code -128 occurs only when a clip below 1 makes a value saturate.

int8 is for activations beside int4. int8_row has the activations of ComfyUI's int8 kernels (comfy-kitchen 0.2.40,
`quantize_int8_rowwise`), beside asym_w4a8 weights.
"""

import torch
from torch import Tensor

from stepquant.formats.integer import IntegerFormat


class Int8(IntegerFormat):
    """Symmetric 8-bit integers with a bfloat16 scale per group; the header of this file states the layout."""

    name = "int8"
    group = 64
    code_bits = 8
    bits = 8 + 16 / 64
    largest = 127

    def encode_scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        """Two's-complement bytes of y; overwrites y."""
        return self.round_to_grid(y, scale).to(torch.int8).view(torch.uint8)

    def _from_codes(self, codes: Tensor) -> Tensor:
        return codes.view(torch.int8).float()


class Int8Row(Int8):
    """The same integers with a float32 scale per row."""

    name = "int8_row"
    group = 0
    bits = 8
    scale_dtype = torch.float32
    smallest_scale = 1e-30  # comfy-kitchen's
