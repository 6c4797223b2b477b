"""Formats by name, and the scales of a weight."""

from torch import Tensor

from stepquant.errors import InvalidInput
from stepquant.formats.asym_w4a8 import AsymW4A8
from stepquant.formats.base import Format, Scales, check_finite
from stepquant.formats.int4 import Int4
from stepquant.formats.int8_row import Int8Row
from stepquant.formats.mxfp4 import Mxfp4
from stepquant.formats.nvfp4 import Nvfp4

_FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (Int4(), Mxfp4(), Nvfp4(), AsymW4A8(), Int8Row())}


def get_format(name: str) -> Format:
    """The format with this name. Raises InvalidInput with the names that exist."""
    if name not in _FORMATS:
        raise InvalidInput(f"format {name!r} does not exist; allowed: {', '.join(_FORMATS)}")
    return _FORMATS[name]


def weight_scales(fmt: Format, W: Tensor, *, rounding: str) -> Scales:
    """Scales of a weight from its largest magnitudes, with the per-tensor scale if the format has one.

    Args:
        fmt: The format to store the weight in.
        W: Weight [N, K] of any float dtype.
        rounding: How an E8M0 scale is rounded, "floor" or "ceil" (mxfp4; the other formats ignore it).

    Raises:
        InvalidInput: W holds NaN or infinity, or the group size does not divide K.
    """
    check_finite(W, "weight")
    return fmt.scales(W, rounding=rounding, tensor=fmt.tensor_scale(W))
