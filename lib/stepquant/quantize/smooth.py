"""Smoothing (SVDQuant, arXiv 2411.05007, section 4.1): one factor per input channel moves outliers into the weight.

The layer sees x/s and the weight is W*s, so that without quantization nothing changes. s is stored in bfloat16 and used
as stored everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepquant.formats import weight_scales
from stepquant.quantize.lowrank import low_rank_factors, stored_branch
from stepquant.quantize.quantized_layer import QuantizedLayer, QuantScheme, layer_output, relative_error
from stepquant.quantize.transform import InputTransform

# Engines quantize nvfp4 activations without a per-tensor scale, so E4M3 group scales must cover them alone: 2^-6 to 448.
# Smoothed channels that reach 16 put those scales near the middle of that range, whatever the size of x.
TYPICAL_MAGNITUDE = 16.0


def smoothing_factor(x_magnitude: Tensor, w_magnitude: Tensor, *, alpha: float, beta: float) -> Tensor:
    """s = x_magnitude^alpha / w_magnitude^beta, times a constant that makes the geometric mean of x_magnitude/s 16; bfloat16 [K].

    x_magnitude, w_magnitude [K]: how far each channel of the input and of the weight reaches. A channel that is dead on either side
    (magnitude 0) has nothing to balance: its s is 1.

    For x_magnitude the root mean square over all tokens (the root of the second moments' diagonal) serves best, 6 to 7 % less
    held-out W4A4 error than SVDQuant's absmax on heavy-tailed layers (docs/recipe.md).
    """
    x_magnitude, w_magnitude = x_magnitude.float(), w_magnitude.float()
    live = (x_magnitude > 0) & (w_magnitude > 0)
    log_s = alpha * x_magnitude.log() - beta * w_magnitude.log()
    size = (x_magnitude.log() - log_s)[live].mean() - math.log(TYPICAL_MAGNITUDE)
    return torch.where(live, log_s + size, torch.zeros_like(log_s)).exp().to(torch.bfloat16)


def nearest_factors(
    W: Tensor, transform: InputTransform, *, rank: int, seed: int, scheme: QuantScheme
) -> QuantizedLayer:
    """SVDQuant without GPTQ: the branch of W*s, and the residual rounded to nearest. W [N, K]."""
    down, up = low_rank_factors(W.float() * transform.smooth.float(), rank, seed=seed)
    return round_to_nearest(W, transform, *stored_branch(down, up, transform.smooth), scheme)


def round_to_nearest(
    W: Tensor, transform: InputTransform, proj_down: Tensor, proj_up: Tensor, scheme: QuantScheme
) -> QuantizedLayer:
    """The layer whose residual under a given branch (bfloat16, as stored) is rounded to nearest."""
    rest = transform.residual(W, proj_down, proj_up)
    scales = weight_scales(scheme.weight, rest, rounding=scheme.weight_rounding)
    offset = transform.offset(W, proj_down, proj_up)
    return QuantizedLayer(scheme.weight.encode(rest, scales), scales, transform, proj_down, proj_up, offset, scheme)


@dataclass(frozen=True)
class TransformSearch:
    """What a search found, its branch as stored, and the relative error of every candidate, in the order given.

    learned: whether the smoothing was moved afterwards (learn.py).
    """

    transform: InputTransform
    proj_down: Tensor
    proj_up: Tensor
    alpha: float
    beta: float
    errors: tuple[float, ...]
    rotation_errors: tuple[float, ...]
    learned: bool = False


def search_transform(
    W: Tensor,
    x: Tensor,
    x_magnitude: Tensor,
    mean: Tensor,
    exponents: Sequence[tuple[float, float]],
    rotations: Sequence[int],
    *,
    rank: int,
    seed: int,
    scheme: QuantScheme,
) -> TransformSearch:
    """Picks (alpha, beta), then the rotation, by what counts: the error of the layer's output on tokens, branch and both
    quantizers included.

    W [N, K] is the stacked weight of the site, x [T, K] the search tokens (raw inputs), x_magnitude [K] as in `smoothing_factor`,
    mean bfloat16 [K] what is taken off the input. The exponents are compared under the first of the rotations, the other
    rotations with the best exponents. The residual is rounded to nearest here, since GPTQ per candidate would cost much.
    Of equal candidates the first wins.
    """
    W, x = W.float(), x.float()
    reference, w_magnitude = x @ W.T, W.abs().amax(dim=0)

    def error(transform: InputTransform, branch: tuple[Tensor, Tensor]) -> float:
        return search_score(W, x, reference, transform, branch, scheme)

    errors: list[float] = []
    for alpha, beta in exponents:
        smooth = smoothing_factor(x_magnitude, w_magnitude, alpha=alpha, beta=beta)
        candidate = (
            InputTransform(smooth, mean, rotations[0]),
            stored_branch(*low_rank_factors(W * smooth.float(), rank, seed=seed), smooth),
        )
        errors.append(error(*candidate))
        if (
            errors.index(min(errors)) == len(errors) - 1
        ):  # only the best is kept: at 13,824 channels each takes its share of memory
            (transform, branch), chosen = candidate, (alpha, beta)
    rotation_errors = (
        min(errors),
        *(error(replace(transform, rotation=rotation), branch) for rotation in rotations[1:]),
    )
    transform = replace(transform, rotation=rotations[rotation_errors.index(min(rotation_errors))])
    return TransformSearch(transform, *branch, *chosen, tuple(errors), rotation_errors)


def search_score(
    W: Tensor,
    x: Tensor,
    reference: Tensor,
    transform: InputTransform,
    branch: tuple[Tensor, Tensor],
    scheme: QuantScheme,
) -> float:
    """Relative output error on x [T, K] of the layer rounded to nearest under a transform and a stored branch; reference is x W^T."""
    return relative_error(layer_output(x, round_to_nearest(W, transform, *branch, scheme), 1.0, 0), reference).item()
