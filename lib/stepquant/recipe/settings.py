"""The params sections that each step of the recipe reads, as one typed record per step."""

from dataclasses import dataclass

from stepquant.formats import get_format
from stepquant.params import Center, Clip, Format, Gptq, LowRank, Rotate, Smooth
from stepquant.quantize.quantized_layer import QuantScheme


def quant_scheme(formats: Format) -> QuantScheme:
    """The formats section as the numerics take it. Raises UserError for a format that does not exist."""
    return QuantScheme(
        get_format(formats.weight), formats.e8m0_weight, get_format(formats.activation), formats.e8m0_activation
    )


@dataclass(frozen=True)
class FactorSettings:
    """What `factor_site` reads of params.yaml."""

    format: Format
    smooth: Smooth
    center: Center
    rotate: Rotate
    lowrank: LowRank


@dataclass(frozen=True)
class RoundSettings:
    """What `round_site` reads of params.yaml."""

    format: Format
    lowrank: LowRank
    gptq: Gptq


@dataclass(frozen=True)
class ClipSettings:
    """What `clip_site` reads of params.yaml."""

    format: Format
    clip: Clip
