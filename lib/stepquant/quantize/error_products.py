"""What the rounding errors of a layer do to a scalar, to first order: their products with the scalar's gradient.

    y = fq(z) Wq^T + low-rank branch + offset        z: transformed input, Wq: dequantized weight

A scalar with gradient G [T, N] by the layer's output changes by sum(G * error). Two errors are told apart: that of the
rounded activations, (fq(z) - z) Wq^T, and that of the weights, what is left if activations are not rounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.formats import Format
from stepquant.quantize.quantized_layer import (
    QuantizedLayer,
    dequantized_weight,
    fake_quantize_input,
    low_rank_path,
)

# Rows of the float32 temporaries.
TOKENS_PER_SLAB = 2048


@dataclass(frozen=True)
class LayerPass:
    """What a layer read and gave in one pass, and a gradient.

    Attributes:
        x: Raw input [T, K].
        y: Output of the unquantized layer without its bias, [T, N].
        G: Gradient of a scalar by the output, [T, N].
    """

    x: Tensor
    y: Tensor
    G: Tensor


def error_products(
    done: LayerPass, layer: QuantizedLayer, clip: float | Tensor, exponent_offset: int | Tensor, wide: Format
) -> Tensor:
    """The change of the scalar by each token's errors.

    Args:
        done: Input, output and gradient.
        layer: The quantized layer with 4-bit activations.
        clip: As in `layer_output`.
        exponent_offset: As in `layer_output`.
        wide: The 8-bit format of activations, which has no clip.

    Returns:
        float32 [3, T]: of activations in 4 bits, of activations in 8 bits, and of the weights. The products with the
        weight are in the dtype of the input, as those of the block were.
    """
    weight = dequantized_weight(layer).to(done.x.dtype)
    slabs = zip(*(part.split(TOKENS_PER_SLAB) for part in (done.x, done.y, done.G)))
    found = [_products(LayerPass(*slab), weight, layer, clip, exponent_offset, wide) for slab in slabs]
    return torch.cat(found, dim=1)


def _products(
    done: LayerPass,
    weight: Tensor,
    layer: QuantizedLayer,
    clip: float | Tensor,
    exponent_offset: int | Tensor,
    wide: Format,
) -> Tensor:
    z, G = layer.transform.apply(done.x), done.G.float()
    back = (done.G.to(weight.dtype) @ weight).float()
    narrow = fake_quantize_input(z, layer.scheme, clip, exponent_offset)
    rounded = wide.fake_quantize(z, rounding=layer.scheme.activation_rounding)
    unrounded = (z.to(weight.dtype) @ weight.T).float() + low_rank_path(done.x, layer)
    return torch.stack(
        [
            (back * (narrow - z)).sum(1),
            (back * (rounded - z)).sum(1),
            (G * (unrounded - done.y.float())).sum(1),
        ]
    )
