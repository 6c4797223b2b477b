"""The arithmetic of one quantized layer; every search and every reported layer error goes through it.

    y = fq(rotate((x - mean) / smooth); clip) @ dequant(codes).T + (x @ proj_down) @ proj_up.T + offset

N rows (all linears of a site stacked), K input channels, rank r, T tokens:

    codes      uint8    [N, K]    4-bit codes of what the branch left of the transformed weight, one code per byte
    scales     Scales             of the weight format
    transform  InputTransform     mean, smooth and rotation (transform.py)
    proj_down  bfloat16 [K, r]    is applied to the raw, unquantized x
    proj_up    bfloat16 [N, r]
    offset     float32  [N]       what the mean contributes; stored in the bias

The bias itself is left out: it cancels in every error. All sums are float32, whatever the dtype of x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.formats import Format, Scales
from stepquant.quantize.transform import InputTransform


@dataclass(frozen=True)
class QuantScheme:
    """The formats a layer computes in.

    weight_rounding, activation_rounding: how an E8M0 scale is chosen, "floor" or "ceil" (mxfp4; ignored by the others).
    activation: None keeps the activations unquantized (W4A16).
    """

    weight: Format
    weight_rounding: str
    activation: Format | None
    activation_rounding: str


@dataclass(frozen=True)
class QuantizedLayer:
    """All that a quantized layer is made of; shapes and dtypes in the header of this file."""

    codes: Tensor
    scales: Scales
    transform: InputTransform
    proj_down: Tensor
    proj_up: Tensor
    offset: Tensor
    scheme: QuantScheme


def layer_output(x: Tensor, factors: QuantizedLayer, clip: float | Tensor, exponent_offset: int | Tensor) -> Tensor:
    """Output of the quantized layer, float32 [T, N], for x [T, K] of any floating dtype.

    clip multiplies each activation group's absmax; exponent_offset is added to its E8M0 exponent (mxfp4, else 0).
    """
    return quantized_path(x, factors, clip, exponent_offset) + low_rank_path(x, factors)


def quantized_path(x: Tensor, factors: QuantizedLayer, clip: float | Tensor, exponent_offset: int | Tensor) -> Tensor:
    """The 4-bit part of the output, float32 [T, N]."""
    seen = fake_quantize_input(factors.transform.apply(x), factors.scheme, clip, exponent_offset)
    return seen @ dequantized_weight(factors).T


def dequantized_weight(factors: QuantizedLayer) -> Tensor:
    """What the codes stand for, float32 [N, K]; it belongs to the transformed input."""
    return factors.scheme.weight.decode(factors.codes, factors.scales)


def fake_quantize_input(z: Tensor, scheme: QuantScheme, clip: float | Tensor, exponent_offset: int | Tensor) -> Tensor:
    """The transformed input z [T, K] as the 4-bit GEMM sees it; as it is where activations stay unquantized."""
    if scheme.activation is None:
        return z
    return scheme.activation.fake_quantize(
        z, clip=clip, exponent_offset=exponent_offset, rounding=scheme.activation_rounding
    )


def rounding_noise(samples: Sequence[Tensor], transform: InputTransform, scheme: QuantScheme) -> Tensor:
    """Variance of what rounding adds to each channel of the transformed input, unclipped, float32 [K]; each sample [T, K] counts the same."""

    def variance(x: Tensor) -> Tensor:
        z = transform.apply(x)
        return (fake_quantize_input(z, scheme, 1.0, 0) - z).square_().mean(0)

    return torch.stack([variance(x) for x in samples]).mean(0)


def low_rank_path(x: Tensor, factors: QuantizedLayer) -> Tensor:
    """The part of the output that no rounding touches: low-rank branch and offset, float32 [T, N]."""
    return (x.float() @ factors.proj_down.float()) @ factors.proj_up.float().T + factors.offset


def relative_error(y: Tensor, reference: Tensor) -> Tensor:
    """||y - reference|| / ||reference||, Frobenius norms, float32 scalar []; 0 where both are zero."""
    error, norm = torch.linalg.vector_norm(y.float() - reference.float()), torch.linalg.vector_norm(reference.float())
    return torch.where(error == 0, torch.zeros_like(error), error / norm)
