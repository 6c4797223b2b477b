"""The precision that most tests of this folder quantize with."""

from stepquant.formats import get_format
from stepquant.quantize.layer import Precision


def precision(name: str) -> Precision:
    """Weights and activations in the same format, scales by ceil."""
    fmt = get_format(name)
    return Precision(weight=fmt, weight_rounding="ceil", activation=fmt, activation_rounding="ceil")
