"""Branch and codes in turn: GPTQ rounds what the branch left, the branch is refitted to what rounding lost.

    R   = transform(W - branch)             scales, Q = GPTQ(R)
    L   = argmin ||z @ (W*s - Q - L).T||    over matrices of the rank, for the transformed inputs z

SVDQuant's reference code alternates with rounding to nearest and the plain norm; here both halves minimise the output error.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from stepquant.formats import Scales
from stepquant.quantize.gptq import InverseFactor, gptq
from stepquant.quantize.layer import LayerFactors, Precision
from stepquant.quantize.lowrank import stored_branch, weighted_low_rank_factors
from stepquant.quantize.rotate import rotate
from stepquant.quantize.transform import InputTransform


def rounded_by_gptq(
    W: Tensor,
    transform: InputTransform,
    proj_down: Tensor,
    proj_up: Tensor,
    factor: InverseFactor,
    precision: Precision,
    choose_scales: Callable[[Tensor], Scales],
    *,
    block_size: int = 128,
) -> LayerFactors:
    """The layer W [N, K] whose residual under a given branch (bfloat16, as stored) is rounded by GPTQ.

    factor: of the second moments of the transformed input. choose_scales: from the residual [N, K]. Raises UserError as `gptq`.
    """
    rest = transform.residual(W, proj_down, proj_up)
    scales = choose_scales(rest)
    codes = gptq(rest, factor, scales, precision.weight, block_size=block_size)
    return LayerFactors(codes, scales, transform, proj_down, proj_up, transform.offset(W, proj_down, proj_up), precision)


def refit_branch(W: Tensor, factors: LayerFactors, factor: InverseFactor, *, seed: int) -> LayerFactors:
    """The same codes with the branch that is best for them, in the norm of the second moments that `factor` is of.

    The codes stay as they are: they are still those of the old residual. Raises UserError as `weighted_low_rank_factors`.
    """
    transform = factors.transform
    lost = rotate(W.float() * transform.smooth.float(), transform.rotation)
    lost -= factors.precision.weight.decode(factors.codes, factors.scales)
    rank = factors.proj_down.shape[1]
    down, up = weighted_low_rank_factors(lost[:, factor.order], factor.U, rank, seed=seed, start=factors.proj_up)
    # Back from the order that GPTQ visits columns in, and from the rotated space (a rotation is its own inverse).
    down = rotate(down[:, factor.order.argsort()], transform.rotation)
    proj_down, proj_up = stored_branch(down, up, transform.smooth)
    return replace(factors, proj_down=proj_down, proj_up=proj_up, offset=transform.offset(W, proj_down, proj_up))
