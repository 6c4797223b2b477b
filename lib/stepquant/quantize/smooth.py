"""Smoothing (SVDQuant, arXiv 2411.05007, section 4.1): one factor per input channel moves outliers into the weight.

The layer sees x/s and the weight is W*s, so that without quantization nothing changes. s is stored in bfloat16 and used
as stored everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.formats import weight_scales
from stepquant.quantize.layer import LayerFactors, Precision, layer_output, relative_error
from stepquant.quantize.lowrank import low_rank_factors, residual, stored_branch
from stepquant.quantize.rotate import rotate

# Engines quantize nvfp4 activations without a per-tensor scale, so E4M3 group scales must cover them alone: 2^-6 to 448.
# Smoothed channels that reach 16 put those scales near the middle of that range, whatever the size of x.
TYPICAL_SPAN = 16.0


@dataclass(frozen=True)
class SmoothingSearch:
    """The best (alpha, beta), its smoothing factor, and the relative error of every candidate in the order given."""

    smooth: Tensor
    alpha: float
    beta: float
    errors: tuple[float, ...]


def smoothing_factor(x_span: Tensor, w_span: Tensor, *, alpha: float, beta: float) -> Tensor:
    """s = x_span^alpha / w_span^beta, times a constant that makes the geometric mean of x_span/s 16; bfloat16 [K].

    x_span, w_span [K]: how far each channel of the input and of the weight reaches. A channel that is dead on either side
    (span 0) has nothing to balance: its s is 1.

    For x_span the root mean square over all tokens (the root of the second moments' diagonal) serves best: 4 % (nvfp4) to
    10 % (int4) less held-out W4A4 error than the absmax, 3 to 4 % on layers whose outlier channels change from bin to
    bin. Of absmax per bin, the maximum over bins is what SVDQuant has; the mean over bins was worse by 4 to 13 %.
    """
    x_span, w_span = x_span.float(), w_span.float()
    live = (x_span > 0) & (w_span > 0)
    log_s = alpha * x_span.log() - beta * w_span.log()
    size = (x_span.log() - log_s)[live].mean() - math.log(TYPICAL_SPAN)
    return torch.where(live, log_s + size, torch.zeros_like(log_s)).exp().to(torch.bfloat16)


def nearest_factors(
    W: Tensor, smooth: Tensor, *, rank: int, seed: int, precision: Precision, rotation: int = 0
) -> LayerFactors:
    """SVDQuant without GPTQ: the branch of W*s, and the residual rounded to nearest. W [N, K], smooth bfloat16 [K]."""
    down, up = low_rank_factors(W.float() * smooth.float(), rank, seed=seed)
    return round_to_nearest(W, smooth, *stored_branch(down, up, smooth), precision, rotation)


def round_to_nearest(
    W: Tensor, smooth: Tensor, proj_down: Tensor, proj_up: Tensor, precision: Precision, rotation: int = 0
) -> LayerFactors:
    """The layer whose residual under a given branch (bfloat16, as stored) is rounded to nearest."""
    rest = rotate(residual(W, smooth, proj_down, proj_up), rotation)
    scales = weight_scales(precision.weight, rest, rounding=precision.weight_rounding)
    return LayerFactors(precision.weight.encode(rest, scales), scales, smooth, proj_down, proj_up, precision, rotation)


def search_smoothing(
    W: Tensor,
    x_span: Tensor,
    x: Tensor,
    candidates: Sequence[tuple[float, float]],
    *,
    rank: int,
    seed: int,
    precision: Precision,
) -> SmoothingSearch:
    """Picks (alpha, beta) by what counts: the error of the layer's output on tokens, branch and both quantizers included.

    W [N, K] is the stacked weight of the site, x_span [K] as in `smoothing_factor`, x [T, K] the search tokens (raw inputs).
    The residual is rounded to nearest here, since GPTQ per candidate would cost much. Of equal candidates the first wins.
    """
    reference = x.float() @ W.float().T
    w_span = W.float().abs().amax(dim=0)
    factors, errors = [], []
    for alpha, beta in candidates:
        smooth = smoothing_factor(x_span, w_span, alpha=alpha, beta=beta)
        layer = nearest_factors(W, smooth, rank=rank, seed=seed, precision=precision)
        factors.append(smooth)
        errors.append(relative_error(layer_output(x, layer, 1.0, 0), reference).item())
    best = errors.index(min(errors))
    return SmoothingSearch(factors[best], *candidates[best], tuple(errors))
