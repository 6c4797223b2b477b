"""Assembles the layer of a variant from the cached factors of its site."""

import torch
from torch import Tensor

from stepquant.quantize.quantized_layer import QuantizedLayer, QuantScheme
from stepquant.quantize.smooth import round_to_nearest
from stepquant.quantize.transform import InputTransform
from stepquant.recipe.site_files import ClipTable, TransformFactors
from stepquant.recipe.variants import Variant


def nearest_layer(W: Tensor, factors: TransformFactors | None, scheme: QuantScheme) -> QuantizedLayer:
    """The layer of a variant without GPTQ: rounded to nearest.

    Args:
        W: Stacked weight of the site, [N, K].
        factors: Transform and first branch; None leaves the input and the weight as they are.
        scheme: Formats of weight and activations.

    Raises:
        UserError: As `round_to_nearest`.
    """
    if factors is not None:
        return round_to_nearest(W, factors.transform, *factors.branch, scheme)
    ones = torch.ones(W.shape[1], dtype=torch.bfloat16, device=W.device)
    empty_down, empty_up = ones.new_zeros(W.shape[1], 0), ones.new_zeros(W.shape[0], 0)
    return round_to_nearest(W, InputTransform.smoothing(ones), empty_down, empty_up, scheme)


def variant_clip(
    variant: Variant, table: ClipTable | None, bins: int, scheme: QuantScheme
) -> tuple[Tensor | None, Tensor | None]:
    """The clips of a site as a checkpoint stores them.

    Args:
        variant: Says whether activations are quantized, and whether one clip serves all bins.
        table: The site's clips; None clips nothing. A site that does not depend on t has one clip for all bins.
        bins: Number of timestep bins of the expert.
        scheme: Says the activation format.

    Returns:
        Clip ratio float32 [bins] and E8M0 exponent offset int8 [bins]; None where the checkpoint has no such tensor.
    """
    if not variant.activations:
        return None, None
    ratio, exponent = torch.ones(bins), torch.zeros(bins, dtype=torch.int8)
    if table is not None:
        single = variant.clip == "single"
        ratio, exponent = (table.single_ratio, table.single_exponent) if single else (table.ratio, table.exponent)
    ratio, exponent = ratio.expand(bins).contiguous(), exponent.expand(bins).contiguous()
    return ratio, exponent if scheme.activation is not None and scheme.activation.has_exponent_scale else None
