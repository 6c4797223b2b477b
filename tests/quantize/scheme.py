"""The formats that most tests of this folder use."""

from stepquant.formats import get_format
from stepquant.quantize.quantized_layer import LayerSpec, QuantScheme


def scheme(name: str) -> QuantScheme:
    """Weights and activations in the same format, scales by ceil."""
    fmt = get_format(name)
    return QuantScheme(
        weight=fmt, weight_rounding="ceil", activation=fmt, activation_rounding="ceil", activation_scales="absmax"
    )


def layer_spec(name: str, rank: int = 8) -> LayerSpec:
    """A branch of some rank, seed 0, and the formats of `scheme`."""
    return LayerSpec(rank, 0, scheme(name))
