"""int8: signed integers, one bfloat16 scale per 64 values. For activations beside int4.

Storage contract of x [..., K]:
    codes   uint8 [..., K]      two's complement: 0..127 are 0..127, 128..255 are -128..-1
    scales  bfloat16 [..., K/64]
    x = code * scale

The scale is absmax * clip / 127, see integer.py. The code -128 occurs only when a clip below 1 makes a value saturate.
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

    def encode_scaled(self, y: Tensor) -> Tensor:
        """Two's-complement bytes of y; overwrites y."""
        return self.round_to_grid(y).to(torch.int8).view(torch.uint8)

    def _from_codes(self, codes: Tensor) -> Tensor:
        return codes.view(torch.int8).float()
