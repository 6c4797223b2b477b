"""int4: signed integers, one bfloat16 scale per 64 values.

Storage contract of x [..., K]:
    codes   uint8 [..., K]      two's-complement nibble: 0..7 are 0..7, 8..15 are -8..-1
    scales  bfloat16 [..., K/64]
    x = code * scale

The scale is absmax * clip / 7, see integer.py. The code -8 occurs only when a clip below 1 makes a value saturate.
"""

import torch
from torch import Tensor

from stepquant.formats.integer import IntegerFormat


class Int4(IntegerFormat):
    """Symmetric 4-bit integers with a bfloat16 scale per group; the header of this file states the layout."""

    name = "int4"
    group = 64
    code_bits = 4
    bits = 4 + 16 / 64
    largest = 7

    def encode_scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        """Two's-complement nibbles of y; overwrites y."""
        return self.round_to_grid(y, scale).to(torch.int8).view(torch.uint8) & 0x0F

    def _from_codes(self, codes: Tensor) -> Tensor:
        # Flipping the sign bit maps the nibble's order 0..7, -8..-1 to 8..15, 0..7, which is the value plus eight.
        return (codes ^ 8).float().sub_(8)
