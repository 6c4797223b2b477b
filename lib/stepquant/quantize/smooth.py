"""Smoothing (SVDQuant, arXiv 2411.05007, section 4.1): one factor per input channel moves outliers into the weight.

The input becomes x/s and the weight W*s, so without quantization nothing changes. s is stored in bfloat16, and the
stored value is used everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepquant.errors import UserError
from stepquant.formats import weight_scales
from stepquant.quantize.lowrank import Branch, low_rank_factors, stored_branch
from stepquant.quantize.quantized_layer import LayerSpec, QuantizedLayer, QuantScheme, layer_output, relative_error
from stepquant.quantize.rotate import SYLVESTER
from stepquant.quantize.transform import InputTransform

# Engines quantize nvfp4 activations without a per-tensor scale, so the E4M3 group scales must cover their range alone:
# 2^-6 to 448. Smoothed channels of magnitude 16 put those scales near the middle of that range, however large x is.
TYPICAL_MAGNITUDE = 16.0


def smoothing_factor(x_magnitude: Tensor, w_magnitude: Tensor, *, alpha: float, beta: float) -> Tensor:
    """s = x_magnitude^alpha / w_magnitude^beta, times a constant that makes the geometric mean of x_magnitude/s 16.

    For x_magnitude the root mean square over all tokens (the root of the Hessian's diagonal) is better than SVDQuant's
    absmax: with absmax the held-out W4A4 error is 0.3 % larger on synthetic layers and 0.7 to 0.9 % larger on the
    demo's sites (docs/experiments/recipe-ablations.md).

    Args:
        x_magnitude: Magnitude of each input channel, [K].
        w_magnitude: Magnitude of each weight column, [K].
        alpha: Exponent of x_magnitude.
        beta: Exponent of w_magnitude.

    Returns:
        bfloat16 [K]. A channel with magnitude 0 on either side has nothing to balance: its s is 1. With both exponents
        0 there is no smoothing: s is 1 everywhere.
    """
    if alpha == beta == 0:
        return torch.ones_like(x_magnitude, dtype=torch.bfloat16)
    x_magnitude, w_magnitude = x_magnitude.float(), w_magnitude.float()
    live = (x_magnitude > 0) & (w_magnitude > 0)
    log_s = alpha * x_magnitude.log() - beta * w_magnitude.log()
    size = (x_magnitude.log() - log_s)[live].mean() - math.log(TYPICAL_MAGNITUDE)
    return torch.where(live, log_s + size, torch.zeros_like(log_s)).exp().to(torch.bfloat16)


def nearest_factors(W: Tensor, transform: InputTransform, spec: LayerSpec) -> QuantizedLayer:
    """SVDQuant without GPTQ: the branch of W*s for W [N, K], and the residual rounded to nearest."""
    down, up = low_rank_factors(W.float() * transform.smooth.float(), spec.rank, seed=spec.seed)
    return round_to_nearest(W, transform, *stored_branch(down, up, transform.smooth), spec.scheme)


def round_to_nearest(
    W: Tensor, transform: InputTransform, proj_down: Tensor, proj_up: Tensor, scheme: QuantScheme
) -> QuantizedLayer:
    """The layer whose residual under a given branch is rounded to nearest.

    Args:
        W: Weight [N, K].
        transform: The input transform.
        proj_down: Branch as stored, bfloat16 [K, r].
        proj_up: Branch as stored, bfloat16 [N, r].
        scheme: Formats of weight and activations.

    Raises:
        UserError: The residual holds NaN or infinity, or the group size does not divide K.
    """
    rest = transform.residual(W, proj_down, proj_up)
    scales = weight_scales(scheme.weight, rest, rounding=scheme.weight_rounding)
    offset = transform.offset(W, proj_down, proj_up)
    return QuantizedLayer(scheme.weight.encode(rest, scales), scales, transform, proj_down, proj_up, offset, scheme)


@dataclass(frozen=True)
class TransformCandidates:
    """What `search_transform` chooses from.

    Attributes:
        exponents: Pairs (alpha, beta) of `smoothing_factor`.
        rotations: Hadamard sizes; 0 is no rotation.
        hadamard: The kind of their matrices (rotate.py).
    """

    exponents: Sequence[tuple[float, float]]
    rotations: Sequence[int]
    hadamard: str = SYLVESTER


@dataclass(frozen=True)
class TransformSearch:
    """Result of a transform search.

    Attributes:
        transform: The selected transform.
        proj_down: Its branch as stored, bfloat16 [K, r].
        proj_up: Its branch as stored, bfloat16 [N, r].
        alpha: The selected exponent of the input magnitude.
        beta: The selected exponent of the weight magnitude.
        errors: Relative output error of every pair of exponents, in the order given; infinity where it is not finite.
        rotation_errors: The same for every rotation.
        learned: Whether the smoothing was refined by gradient afterwards (smooth_gradient.py).
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
    W: Tensor, x: Tensor, x_magnitude: Tensor, mean: Tensor, candidates: TransformCandidates, spec: LayerSpec
) -> TransformSearch:
    """Selects (alpha, beta), then the rotation, by the error of the layer's output with branch and both quantizers.

    The pairs of exponents are compared under the first of the rotations, the other rotations with the best pair. The
    residual is rounded to nearest here, since GPTQ per candidate would be expensive. Of equal candidates the first is
    selected.

    Args:
        W: Stacked weight of the site, [N, K].
        x: Search tokens, raw inputs [T, K].
        x_magnitude: Magnitude of each input channel, [K], as in `smoothing_factor`.
        mean: The mean that is subtracted from the input, bfloat16 [K].
        candidates: Exponents and rotations to compare.
        spec: Rank, seed and formats of the layer.

    Raises:
        UserError: No candidate has a finite error; or as `low_rank_factors` and `round_to_nearest`.
    """
    W, x = W.float(), x.float()
    reference, w_magnitude = x @ W.T, W.abs().amax(dim=0)
    errors: list[float] = []
    found, best = None, math.inf
    for alpha, beta in candidates.exponents:
        smooth = smoothing_factor(x_magnitude, w_magnitude, alpha=alpha, beta=beta)
        transform = InputTransform(smooth, mean, candidates.rotations[0], candidates.hadamard)
        branch = stored_branch(*low_rank_factors(W * smooth.float(), spec.rank, seed=spec.seed), smooth)
        errors.append(search_score(W, x, reference, transform, branch, spec.scheme))
        if errors[-1] < best:  # only the best candidate is kept: at 13,824 channels they are large
            best, found = errors[-1], TransformSearch(transform, *branch, alpha, beta, (), ())
    if found is None:
        raise UserError(_nothing_finite(len(errors)))
    branch, scores = (found.proj_down, found.proj_up), [best]
    for rotation in candidates.rotations[1:]:
        rotated = replace(found.transform, rotation=rotation)
        scores.append(search_score(W, x, reference, rotated, branch, spec.scheme))
    transform = replace(found.transform, rotation=candidates.rotations[scores.index(min(scores))])
    return replace(found, transform=transform, errors=tuple(errors), rotation_errors=tuple(scores))


def search_score(
    W: Tensor, x: Tensor, reference: Tensor, transform: InputTransform, branch: Branch, scheme: QuantScheme
) -> float:
    """Relative output error of the layer rounded to nearest under a transform and a stored branch.

    Args:
        W: Weight [N, K].
        x: Raw inputs [T, K].
        reference: x @ W.T, [T, N].
        transform: The input transform.
        branch: The branch as stored.
        scheme: Formats of weight and activations.

    Returns:
        The error; infinity where it is not finite, so that a candidate with NaN is never the smallest.
    """
    layer = round_to_nearest(W, transform, *branch, scheme)
    error = relative_error(layer_output(x, layer, 1.0, 0), reference).item()
    return error if math.isfinite(error) else math.inf


def _nothing_finite(candidates: int) -> str:
    return (
        f"smoothing search: none of {candidates} candidates has a finite output error on the search tokens, so the "
        "site's captured inputs hold NaN or infinity, or its output is zero; check the source model's weights, and "
        "run stage capture again (with compute.dtype float32 or bfloat16 if it was float16)"
    )
