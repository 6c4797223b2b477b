"""E2M1, the 4-bit floating-point element of mxfp4 and nvfp4 (OCP Microscaling Formats 1.0, section 5.3.3).

Storage contract: code uint8 0..15 = sign (bit 3), exponent (bits 2..1, bias 1), mantissa (bit 0).
    code       0    1    2    3    4    5    6    7        8..15: the same, negative (8 is -0)
    value      0   0.5   1   1.5   2    3    4    6
"""

import torch
from torch import Tensor

E2M1_MAX = 6.0

_FLOAT32_EXPONENT = 0x7F800000  # the exponent field; alone, the bits of a power of two
_ONE = 0x3F800000  # bits of 1.0
_TIMES_3_POW2_21 = 0x0B400000  # added to the bits of a power of two p, gives 1.5 * 2^22 * p


def round_e2m1(y: Tensor) -> Tensor:
    """y (float32) rounded to the nearest E2M1 value, ties to the even code, saturating at 6; overwrites y."""
    y.clamp_(-E2M1_MAX, E2M1_MAX)
    # Values in [p, 2p) are p/2 apart, and so are those below 1. A float32 near 1.5 * 2^22 * p has an ulp of exactly
    # p/2: adding it makes the hardware round y there, ties to even, and subtracting it is exact.
    p = (y.view(torch.int32) & _FLOAT32_EXPONENT).clamp_(min=_ONE)
    shift = p.add_(_TIMES_3_POW2_21).view(torch.float32)
    return y.add_(shift).sub_(shift)


def to_e2m1_codes(y: Tensor) -> Tensor:
    """uint8 codes 0..15 of y (float32), rounded as in `round_e2m1`; overwrites y."""
    sign = torch.signbit(y).to(torch.uint8) << 3  # taken first: -0.1 rounds to code 8, negative zero
    a = round_e2m1(y).abs_()
    # The magnitude's code is linear in a below 2, from 2 to 4, and above; the slopes fall, so it is their minimum.
    code = torch.minimum(torch.minimum(2 * a, a + 2), a / 2 + 4)
    return code.to(torch.uint8) | sign


def from_e2m1_codes(codes: Tensor) -> Tensor:
    """float32 values of uint8 codes 0..15."""
    c = (codes & 7).float()
    magnitude = torch.maximum(torch.maximum(c / 2, c - 2), 2 * c - 8)
    return torch.where(codes > 7, -magnitude, magnitude)
