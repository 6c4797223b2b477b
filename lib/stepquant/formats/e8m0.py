"""E8M0, the power-of-two scale of mxfp4 and mxfp8 (OCP Microscaling Formats 1.0, sections 5.4.1 and 6.3).

Storage contract: uint8 e is 2^(e - 127), e in 0..253 (no float32 needs 254; 255 is NaN).

The exponent of a group with largest magnitude amax (clip included), whose largest element is E (6 or 448):
    "floor"  floor(log2(amax)) - floor(log2(E))     the specification's rule; magnitudes above E * scale saturate
    "ceil"   ceil(log2(amax / E))                   nothing saturates
then + exponent_offset, limited to 0..253. A group of zeros has e = 0 before the offset.
"""

import math

import torch
from torch import Tensor

from stepquant.errors import InvalidInput

_BIAS = 127
_LARGEST = 253


def e8m0_scales(amax: Tensor, largest_element: float, exponent_offset: int | Tensor, rounding: str) -> Tensor:
    """E8M0 scales, uint8 in the shape of amax. Exact, which a logarithm in floating point is not.

    Args:
        amax: Largest magnitude of each group, float32.
        largest_element: Of the element type.
        exponent_offset: Added to the exponents; an int or an integer tensor.
        rounding: "floor" or "ceil".

    Raises:
        InvalidInput: rounding is neither.
    """
    if rounding not in ("floor", "ceil"):
        raise InvalidInput(f"rounding of an E8M0 scale: {rounding!r}; allowed: 'floor', 'ceil'")
    # A float is mantissa * 2^exponent with a mantissa in [0.5, 1), so amax / E is (m / M) * 2^(exponent - exponent_E).
    M, exponent_E = math.frexp(largest_element)
    m, exponent = torch.frexp(amax)
    exponent = exponent - exponent_E
    if rounding == "ceil":
        exponent = exponent + (m > M).int()
    biased = torch.where(amax > 0, exponent + _BIAS, 0) + exponent_offset
    return biased.clamp(0, _LARGEST).to(torch.uint8)


def e8m0_value(scales: Tensor) -> Tensor:
    """float32 values of E8M0 scales."""
    # e is float32's exponent field, except that e = 0 is 2^-127: subnormal, bit 22. (torch.compile lacks E8M0.)
    return (scales.int() << 23).clamp(min=1 << 22).view(torch.float32)


def e8m0_reciprocal(scales: Tensor) -> Tensor:
    """float32 reciprocals of E8M0 scales."""
    # 2^(127 - e), also from its bits: dividing by 2^-127 would fail on devices that flush subnormals to zero.
    return ((2 * _BIAS - scales.int()) << 23).view(torch.float32)
