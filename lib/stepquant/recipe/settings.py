"""The sections of params.yaml that each part of the recipe reads, as one typed record per part."""

from dataclasses import dataclass

from stepquant.formats import get_format
from stepquant.params import Center, Clip, Format, Gptq, LowRank, Rotate, Smooth
from stepquant.quantize.quantized_layer import QuantScheme


def quant_scheme(formats: Format) -> QuantScheme:
    """The formats section in the form that quantize/ uses. Raises UserError for a format that does not exist."""
    return QuantScheme(
        get_format(formats.weight),
        formats.e8m0_weight,
        get_format(formats.activation),
        formats.e8m0_activation,
        formats.activation_scales,
    )


@dataclass(frozen=True)
class FactorSettings:
    """The sections that `factor_site` reads."""

    format: Format
    smooth: Smooth
    center: Center
    rotate: Rotate
    lowrank: LowRank


@dataclass(frozen=True)
class RoundSettings:
    """The sections that `round_site` reads."""

    format: Format
    lowrank: LowRank
    gptq: Gptq


@dataclass(frozen=True)
class ClipSettings:
    """The sections that `clip_site` reads."""

    format: Format
    clip: Clip
