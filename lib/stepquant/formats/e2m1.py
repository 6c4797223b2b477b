"""E2M1, the 4-bit floating-point element of mxfp4 and nvfp4 (OCP Microscaling Formats 1.0, section 5.3.3).

Storage contract: code uint8 0..15 = sign (bit 3), exponent (bits 2..1, bias 1), mantissa (bit 0).
    code       0    1    2    3    4    5    6    7        8..15: the same, negative (8 is -0)
    value      0   0.5   1   1.5   2    3    4    6
"""

import torch
from torch import Tensor

from stepquant.formats.base import Format
from stepquant.formats.round_float import round_float

E2M1_MAX = 6.0

# A float16 (exponent bias 15, 10 mantissa bits) whose lowest exponent bits and highest mantissa bit are those of the
# E2M1 code has the same value times 2^-14, subnormals included: codes and floats convert by shifts, without a table.
_BIAS_GAP = 15 - 1
_MANTISSA_GAP = 10 - 1


def round_e2m1(y: Tensor) -> Tensor:
    """Rounds y (float32) in place to the nearest E2M1 value, ties to the even code, saturating at 6; returns y."""
    return round_float(y, E2M1_MAX, mantissa_bits=1, smallest_exponent=0)


def to_e2m1_codes(y: Tensor) -> Tensor:
    """uint8 codes 0..15 of y (float32), rounded as in `round_e2m1`; overwrites y."""
    sign = (y.view(torch.int32) >> 28).to(torch.uint8) & 8  # taken first: -0.1 rounds to code 8, negative zero
    fields = (round_e2m1(y) * 2.0**-_BIAS_GAP).half().view(torch.int16)
    return (fields >> _MANTISSA_GAP).to(torch.uint8) & 7 | sign


def from_e2m1_codes(codes: Tensor) -> Tensor:
    """float32 values of uint8 codes 0..15."""
    wide = codes.to(torch.int16)
    fields = (wide & 7) << _MANTISSA_GAP | (wide & 8) << 12
    return fields.view(torch.float16).float().mul_(2.0**_BIAS_GAP)


class E2M1Format(Format):
    """A format with E2M1 elements; the subclass defines the scales."""

    code_bits = 4

    def round_to_grid(self, y: Tensor, scale: Tensor) -> Tensor:
        """As `round_e2m1`."""
        return round_e2m1(y)

    def encode_scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        """As `to_e2m1_codes`."""
        return to_e2m1_codes(y)

    def _from_codes(self, codes: Tensor) -> Tensor:
        return from_e2m1_codes(codes)
