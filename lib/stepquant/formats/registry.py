"""Formats by name, and the scales of a weight."""

from torch import Tensor

from stepquant.errors import InvalidInput
from stepquant.formats.base import Format, Scales, check_finite
from stepquant.formats.int4 import Int4
from stepquant.formats.int8 import Int8
from stepquant.formats.mxfp4 import Mxfp4
from stepquant.formats.mxfp8 import Mxfp8
from stepquant.formats.nvfp4 import Nvfp4

_FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (Int4(), Mxfp4(), Nvfp4(), Int8(), Mxfp8())}
# Engines have kernels whose activations are in one of these beside the other.
_EIGHT_BIT_PARTNERS = {"int4": "int8", "mxfp4": "mxfp8", "nvfp4": "mxfp8"}


def get_format(name: str) -> Format:
    """The format with this name. Raises InvalidInput with the names that exist."""
    if name not in _FORMATS:
        raise InvalidInput(f"format {name!r} does not exist; allowed: {', '.join(_FORMATS)}")
    return _FORMATS[name]


def four_bit_names() -> tuple[str, ...]:
    """Names of the formats that weights are stored in."""
    return tuple(name for name, fmt in _FORMATS.items() if fmt.code_bits == 4)


def eight_bit_partner(fmt: Format) -> Format:
    """The 8-bit format for activations beside a 4-bit format. Raises InvalidInput if fmt has 8 bits itself."""
    if fmt.name not in _EIGHT_BIT_PARTNERS:
        raise InvalidInput(f"format {fmt.name!r} has no 8-bit partner; allowed: {', '.join(_EIGHT_BIT_PARTNERS)}")
    return _FORMATS[_EIGHT_BIT_PARTNERS[fmt.name]]


def weight_scales(fmt: Format, W: Tensor, *, rounding: str) -> Scales:
    """Scales of a weight from its largest magnitudes, with the per-tensor scale if the format has one.

    Args:
        fmt: The format to store the weight in.
        W: Weight [N, K] of any float dtype.
        rounding: How an E8M0 scale is rounded, "floor" or "ceil" (mxfp4; the other 4-bit formats ignore it).

    Raises:
        InvalidInput: W holds NaN or infinity, or the group size does not divide K.
    """
    check_finite(W, "weight")
    return fmt.scales(W, rounding=rounding, tensor=fmt.tensor_scale(W))
