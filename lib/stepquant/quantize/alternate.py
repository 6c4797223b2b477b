"""Branch and codes in turn, for inputs that are rounded too.

Let z be the transformed input, W the transformed weight, H = E z z^T, and let rounding make z + n of z. If n is taken as
uncorrelated, of variance D per channel, then with a branch L and what the codes stand for, Q, the squared error of the output is

    tr((W - L - Q) H (W - L - Q)^T) + tr(Q D Q^T)

and three parts of its minimum are known:

    Q for a given L              GPTQ of (W - L) H (H + D)^-1 in the norm H + D: where z hardly goes, a smaller weight picks up less noise
    L for a given Q              the best approximation of W - Q of its rank in the norm H
    L before there is a Q        that of W in the norm H - H (H + D)^-1 H = D - D (H + D)^-1 D, what the best real-valued Q leaves

H is damped, alike in all of them: where calibration never went, damping stands for what may come (damping.py). Without noise this
is GPTQ and a branch refitted to what it lost. SVDQuant's reference code alternates with rounding to nearest and the plain norm.
What the noise is worth: docs/recipe.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stepquant.formats import Scales
from stepquant.quantize.gptq import InverseFactor, gptq, inverse_factor
from stepquant.quantize.lowrank import stored_branch, weighted_low_rank_factors
from stepquant.quantize.quantized_layer import QuantizedLayer, QuantScheme
from stepquant.quantize.rotate import rotate
from stepquant.quantize.transform import InputTransform


@dataclass(frozen=True)
class RoundingProblem:
    """A weight to be rounded, and for which inputs.

    W float32 [N, K] as in the model; transformed [N, K]; moments [K, K]: H of the transformed input; noise [K]: D, None without;
    factor: of H + D.
    """

    W: Tensor
    transform: InputTransform
    transformed: Tensor
    hessian: Tensor
    noise: Tensor | None
    factor: InverseFactor

    @cached_property
    def target(self) -> Tensor:
        """(transformed) H (H + D)^-1 [N, K]; made when asked for, because two products with a triangle are a tenth of all the work."""
        return _noise_aware_target(self.transformed, self.noise, self.factor)

    def times_hessian(self, thin: Tensor) -> Tensor:
        """H @ thin [K, n], H damped as in the factor."""
        return torch.addmm(thin, self.hessian, thin, beta=self.factor.ridge)


def make_problem(
    W: Tensor, transform: InputTransform, hessian: Tensor, noise: Tensor | None, *, damping: float, act_order: bool
) -> RoundingProblem:
    """The problem of W [N, K] under second moments [K, K] and noise [K] of the transformed input. Raises UserError as `inverse_factor`."""
    factor = inverse_factor(hessian, damping=damping, act_order=act_order, noise=noise)
    return RoundingProblem(W, transform, transform.weight(W), hessian, noise, factor)


def with_damping(problem: RoundingProblem, damping: float, *, act_order: bool) -> RoundingProblem:
    """The same problem under another damping. Raises UserError as `inverse_factor`."""
    return replace(
        problem, factor=inverse_factor(problem.hessian, damping=damping, act_order=act_order, noise=problem.noise)
    )


def select_rows(problem: RoundingProblem, rows: Tensor) -> RoundingProblem:
    """The same problem for some of the outputs [M] int64."""
    return replace(problem, W=problem.W[rows], transformed=problem.transformed[rows])


def _noise_aware_target(X: Tensor, noise: Tensor | None, factor: InverseFactor) -> Tensor:
    """X H (H + D)^-1 = X - X D (H + D)^-1, for X [M, K]."""
    return X if noise is None else X - factor.divide(X * noise)


def initial_branch(problem: RoundingProblem, rank: int, *, seed: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """The branch, as stored, that leaves least to be lost to the noise; start [N, r]: `up` of the plain one. Raises UserError as
    `weighted_low_rank_factors`."""
    D = problem.noise

    def times_lost(thin: Tensor) -> Tensor:
        noisy = D[:, None] * thin
        return noisy - D[:, None] * problem.factor.divide(noisy.T).T

    return _stored(problem, *weighted_low_rank_factors(problem.transformed, times_lost, rank, seed=seed, start=start))


def rounded_by_gptq(
    problem: RoundingProblem,
    proj_down: Tensor,
    proj_up: Tensor,
    scheme: QuantScheme,
    choose_scales: Callable[[Tensor], Scales],
    *,
    column_block: int = 128,
) -> QuantizedLayer:
    """The layer with what a given branch (bfloat16, as stored) leaves of the weight rounded by GPTQ.

    choose_scales: from what is to be rounded [N, K]. Raises UserError as `gptq`.
    """
    W, transform, factor = problem.W, problem.transform, problem.factor
    down = _noise_aware_target(transform.weight(proj_down.T), problem.noise, factor)
    rest = problem.target.addmm(proj_up.float(), down, alpha=-1)
    scales = choose_scales(rest)
    codes = gptq(rest, factor, scales, scheme.weight, column_block=column_block)
    return QuantizedLayer(codes, scales, transform, proj_down, proj_up, transform.offset(W, proj_down, proj_up), scheme)


def refit_branch(problem: RoundingProblem, layer: QuantizedLayer, *, seed: int) -> QuantizedLayer:
    """The same codes with the branch that is best for them.

    The codes stay as they are: they are still those of the old residual. Raises UserError as `weighted_low_rank_factors`.
    """
    lost = problem.transformed - layer.scheme.weight.decode(layer.codes, layer.scales)
    rank = layer.proj_down.shape[1]
    factors = weighted_low_rank_factors(lost, problem.times_hessian, rank, seed=seed, start=layer.proj_up)
    proj_down, proj_up = _stored(problem, *factors)
    offset = problem.transform.offset(problem.W, proj_down, proj_up)
    return replace(layer, proj_down=proj_down, proj_up=proj_up, offset=offset)


def _stored(problem: RoundingProblem, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A branch of the transformed weight as it is stored; a rotation is its own inverse."""
    return stored_branch(rotate(down, problem.transform.rotation), up, problem.transform.smooth)
