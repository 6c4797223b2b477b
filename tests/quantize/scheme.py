"""The scheme that most tests of this folder quantize with."""

from stepquant.formats import get_format
from stepquant.quantize.quantized_layer import QuantScheme


def scheme(name: str) -> QuantScheme:
    """Weights and activations in the same format, scales by ceil."""
    fmt = get_format(name)
    return QuantScheme(weight=fmt, weight_rounding="ceil", activation=fmt, activation_rounding="ceil")
