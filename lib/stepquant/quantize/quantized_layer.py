"""The arithmetic of one quantized layer, used by every search and every reported layer error.

    y = fq(rotate((x - mean) / smooth); clip) @ dequant(codes).T + (x @ proj_down) @ proj_up.T + offset

N rows (all linears of a site stacked), K input channels, rank r, T tokens:

    codes      uint8    [N, K]    4-bit codes of the transformed weight without the branch, one code per byte
    scales     Scales             of the weight format
    transform  InputTransform     mean, smooth and rotation (transform.py)
    proj_down  bfloat16 [K, r]    is applied to the raw (untransformed, unquantized) input
    proj_up    bfloat16 [N, r]
    offset     float32  [N]       the mean's contribution to the output; a checkpoint adds it to the bias

The bias itself is left out: it cancels in every error. All sums are float32, whatever the dtype of x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.errors import InvalidInput
from stepquant.formats import Format, Scales
from stepquant.quantize.activation_scales import fake_quantize_activation
from stepquant.quantize.transform import InputTransform


@dataclass(frozen=True)
class QuantScheme:
    """The formats that a layer computes in.

    Attributes:
        weight: Format of the weight.
        weight_rounding: How an E8M0 scale of the weight is rounded, "floor" or "ceil" (mxfp4; other formats ignore it).
        activation: Format of the activations; None leaves them unquantized (W4A16).
        activation_rounding: As weight_rounding, for the activations.
        activation_scales: How the scale of an activation group is chosen, as in `fake_quantize_activation`.
    """

    weight: Format
    weight_rounding: str
    activation: Format | None
    activation_rounding: str
    activation_scales: str

    @property
    def activation_format(self) -> Format:
        """The format of the activations, for work that needs one. Raises InvalidInput if they stay unquantized."""
        if self.activation is None:
            raise InvalidInput("activations stay unquantized (W4A16); expected a 4-bit activation format")
        return self.activation


@dataclass(frozen=True)
class LayerSpec:
    """What a layer is quantized to while its transform is searched.

    Attributes:
        rank: Rank of the low-rank branch.
        seed: Seed of the randomized SVD.
        scheme: Formats of weight and activations.
    """

    rank: int
    seed: int
    scheme: QuantScheme


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized layer; shapes and dtypes in the header of this file."""

    codes: Tensor
    scales: Scales
    transform: InputTransform
    proj_down: Tensor
    proj_up: Tensor
    offset: Tensor
    scheme: QuantScheme


def layer_output(x: Tensor, layer: QuantizedLayer, clip: float | Tensor, exponent_offset: int | Tensor) -> Tensor:
    """Output of the quantized layer, without its bias.

    Args:
        x: Raw input [T, K] of any float dtype.
        layer: The quantized layer.
        clip: Multiplies the absmax of each activation group.
        exponent_offset: Added to the E8M0 exponent of each activation group (mxfp4; 0 for the other formats).

    Returns:
        float32 [T, N].
    """
    return quantized_path(x, layer, clip, exponent_offset) + low_rank_path(x, layer)


def quantized_path(x: Tensor, layer: QuantizedLayer, clip: float | Tensor, exponent_offset: int | Tensor) -> Tensor:
    """The 4-bit part of the output, float32 [T, N]; arguments as in `layer_output`."""
    rounded = fake_quantize_input(layer.transform.apply(x), layer.scheme, clip, exponent_offset)
    return rounded @ dequantized_weight(layer).T


def low_rank_path(x: Tensor, layer: QuantizedLayer) -> Tensor:
    """The part of the output that is not rounded: low-rank branch and offset, float32 [T, N]."""
    return (x.float() @ layer.proj_down.float()) @ layer.proj_up.float().T + layer.offset


def dequantized_weight(layer: QuantizedLayer) -> Tensor:
    """The values of the codes, float32 [N, K]; they multiply the transformed input."""
    return layer.scheme.weight.decode(layer.codes, layer.scales)


def fake_quantize_input(z: Tensor, scheme: QuantScheme, clip: float | Tensor, exponent_offset: int | Tensor) -> Tensor:
    """The transformed input z [T, K] rounded to the activation format; z itself if activations stay unquantized."""
    if scheme.activation is None:
        return z
    return fake_quantize_activation(
        z,
        scheme.activation,
        scheme.activation_scales,
        clip=clip,
        exponent_offset=exponent_offset,
        rounding=scheme.activation_rounding,
    )


def rounding_noise(samples: Sequence[Tensor], transform: InputTransform, scheme: QuantScheme) -> Tensor:
    """Variance that rounding adds to each channel of the transformed input, without clipping.

    Args:
        samples: Raw inputs [T, K], one tensor per timestep bin; each has the same weight in the mean.
        transform: The input transform.
        scheme: Says the activation format.

    Returns:
        float32 [K].
    """

    def variance(x: Tensor) -> Tensor:
        z = transform.apply(x)
        return (fake_quantize_input(z, scheme, 1.0, 0) - z).square_().mean(0)

    return torch.stack([variance(x) for x in samples]).mean(0)


def relative_error(y: Tensor, reference: Tensor) -> Tensor:
    """||y - reference|| / ||reference||, Frobenius norms, float32 scalar []; 0 where both are equal."""
    error, norm = torch.linalg.vector_norm(y.float() - reference.float()), torch.linalg.vector_norm(reference.float())
    return torch.where(error == 0, torch.zeros_like(error), error / norm)
