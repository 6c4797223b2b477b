"""Put a variant's layer together from the cached factors of its site."""

import torch
from torch import Tensor

from stepquant.quantize.quantized_layer import QuantizedLayer, QuantScheme
from stepquant.quantize.smooth import round_to_nearest
from stepquant.quantize.transform import InputTransform
from stepquant.recipe.site_files import ClipTable, ResidualFactors, TransformFactors
from stepquant.recipe.variants import Variant


def variant_layer(
    W: Tensor, factors: TransformFactors | None, residual: ResidualFactors | None, scheme: QuantScheme
) -> QuantizedLayer:
    """A site's weights [N, K] from the factors that a variant takes: GPTQ's codes if `residual` is given, else rounded to nearest under
    the transform and branch of `factors`, or as the weight is where that is None too."""
    if residual is not None:
        assert factors is not None, "a residual is that of a transform"
        return residual.layer(factors.transform, scheme)
    if factors is not None:
        return round_to_nearest(W, factors.transform, *factors.branch, scheme)
    ones = torch.ones(W.shape[1], dtype=torch.bfloat16, device=W.device)
    nothing = ones.new_zeros(W.shape[1], 0), ones.new_zeros(W.shape[0], 0)
    return round_to_nearest(W, InputTransform.smoothing(ones), *nothing, scheme)


def variant_clip(
    variant: Variant, table: ClipTable | None, bins: int, scheme: QuantScheme
) -> tuple[Tensor | None, Tensor | None]:
    """Clip ratio float32 [bins] and E8M0 exponent offset int8 [bins] as a checkpoint stores them; None where the layout has none.

    A site that does not depend on t has one clip, which every bin gets. Without a table nothing is clipped.
    """
    if not variant.activations:
        return None, None
    ratio, exponent = torch.ones(bins), torch.zeros(bins, dtype=torch.int8)
    if table is not None:
        single = variant.clip == "single"
        ratio, exponent = (table.single_ratio, table.single_exponent) if single else (table.ratio, table.exponent)
    ratio, exponent = ratio.expand(bins).contiguous(), exponent.expand(bins).contiguous()
    return ratio, exponent if scheme.activation is not None and scheme.activation.name == "mxfp4" else None
