"""Formats by name, which of them go where, and the scales of a weight."""

from torch import Tensor

from stepquant.errors import InvalidInput
from stepquant.formats.asym_w4a8 import AsymW4A8
from stepquant.formats.base import Format, Scales, check_finite
from stepquant.formats.int4 import Int4
from stepquant.formats.int8 import Int8, Int8Row
from stepquant.formats.mxfp4 import Mxfp4
from stepquant.formats.mxfp8 import Mxfp8
from stepquant.formats.nvfp4 import Nvfp4

_FORMATS: dict[str, Format] = {
    fmt.name: fmt for fmt in (Int4(), Mxfp4(), Nvfp4(), AsymW4A8(), Int8Row(), Int8(), Mxfp8())
}
# Engines have kernels whose activations are in one of these beside the other.
_EIGHT_BIT_PARTNERS = {"int4": "int8", "mxfp4": "mxfp8", "nvfp4": "mxfp8"}


def get_format(name: str) -> Format:
    """The format with this name. Raises InvalidInput with the names that exist."""
    if name not in _FORMATS:
        raise InvalidInput(f"format {name!r} does not exist; allowed: {', '.join(_FORMATS)}")
    return _FORMATS[name]


def weight_formats() -> tuple[str, ...]:
    """Names of the formats that weights are stored in: those of 4 bits."""
    return tuple(name for name, fmt in _FORMATS.items() if fmt.code_bits == 4)


def activation_formats() -> tuple[str, ...]:
    """Names of the formats that activations can have in all timestep bins. The 8-bit partners are for some bins."""
    partners = _EIGHT_BIT_PARTNERS.values()
    return tuple(name for name, fmt in _FORMATS.items() if fmt.for_activations and name not in partners)


def eight_bit_partner(fmt: Format) -> Format:
    """The 8-bit format that activations can have in some bins beside fmt in the others; fmt itself if it has 8 bits.

    Raises:
        InvalidInput: Activations cannot be rounded to fmt.
    """
    if not fmt.for_activations:
        raise InvalidInput(f"{fmt.name} is a format of weights alone; allowed: {', '.join(activation_formats())}")
    return fmt if fmt.code_bits == 8 else _FORMATS[_EIGHT_BIT_PARTNERS[fmt.name]]


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
