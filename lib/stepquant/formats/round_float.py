"""Rounds float32 to a floating-point type with fewer bits, by float32 arithmetic."""

import torch
from torch import Tensor

_EXPONENT_FIELD = 0x7F800000  # alone, it is the bits of a power of two
_BIAS, _MANTISSA_BITS = 127, 23


def round_float(y: Tensor, largest: float, mantissa_bits: int, smallest_exponent: int) -> Tensor:
    """Rounds y (float32) in place to the nearest value of a type, ties to the even code, saturating; returns y.

    Args:
        y: Finite or infinite values.
        largest: The type's largest value.
        mantissa_bits: Explicit bits of its mantissa.
        smallest_exponent: Of its normal numbers; subnormal ones are as far apart as those in the lowest binade.
    """
    y.clamp_(-largest, largest)
    # Values in [p, 2p), p a power of two, are p * 2^-mantissa_bits apart. The ulp of a float32 near
    # 1.5 * 2^(23 - mantissa_bits) * p is exactly that: adding this number makes the hardware round y there, ties to
    # even, and subtracting it is exact. The product with a power of two is exact, so it does not matter whether the
    # addition is a fused multiply-add.
    lowest = smallest_exponent + _BIAS << _MANTISSA_BITS
    p = (y.view(torch.int32) & _EXPONENT_FIELD).clamp_(min=lowest).view(torch.float32)
    shift = 1.5 * 2.0 ** (_MANTISSA_BITS - mantissa_bits)
    return y.add_(p, alpha=shift).sub_(p, alpha=shift)
