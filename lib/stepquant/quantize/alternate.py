"""Alternating GPTQ and low-rank refits under activation-quantization noise.

Let z be the transformed input, W the transformed weight, H = E z z^T, and let rounding turn z into z + n. If n is
uncorrelated with z and has the variance D per channel, then with a branch L and dequantized codes Q the squared error
of the output is

    tr((W - L - Q) H (W - L - Q)^T) + tr(Q D Q^T)

Three parts of its minimum are known:

    Q for a given L      GPTQ of (W - L) H (H + D)^-1 in the norm H + D: in low-energy directions shrinking the weight
                         lowers the noise gain
    L for a given Q      the best approximation of W - Q of its rank in the norm H
    L without any Q      that of W in the norm H - H (H + D)^-1 H = D - D (H + D)^-1 D, the error that the best
                         real-valued Q leaves

H is damped alike in all three: in directions without calibration tokens damping stands for the energy that other
prompts may have (damping.py). Without noise this is GPTQ and a branch refitted to its error. SVDQuant's reference code
alternates with rounding to nearest and the plain norm. docs/experiments/noise-and-damping.md measures the noise term.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stepquant.formats import Scales
from stepquant.quantize.gptq import InverseFactor, gptq, inverse_factor
from stepquant.quantize.lowrank import Branch, stored_branch, weighted_low_rank_factors
from stepquant.quantize.quantized_layer import QuantizedLayer, QuantScheme
from stepquant.quantize.transform import InputTransform


@dataclass(frozen=True)
class RoundingProblem:
    """A weight to be rounded, and the statistics of its input.

    Attributes:
        W: The weight as in the model, float32 [N, K].
        transform: The input transform.
        transformed: The transformed weight, float32 [N, K].
        hessian: H of the transformed input, float32 [K, K].
        noise: D, float32 [K]; None without noise.
        factor: Inverse factor of H + D.
    """

    W: Tensor
    transform: InputTransform
    transformed: Tensor
    hessian: Tensor
    noise: Tensor | None
    factor: InverseFactor

    @cached_property
    def target(self) -> Tensor:
        """(transformed) H (H + D)^-1, [N, K].

        Computed on first use: its two products with a triangle are a tenth of all the work.
        """
        return _noise_aware_target(self.transformed, self.noise, self.factor)

    def times_hessian(self, thin: Tensor) -> Tensor:
        """H @ thin [K, n], with H damped as in the factor."""
        return torch.addmm(thin, self.hessian, thin, beta=self.factor.ridge)


def make_problem(
    W: Tensor, transform: InputTransform, hessian: Tensor, noise: Tensor | None, *, damping: float, act_order: bool
) -> RoundingProblem:
    """The problem of a weight.

    Args:
        W: The weight as in the model, [N, K].
        transform: The input transform.
        hessian: H of the transformed input, [K, K].
        noise: Variance of the rounding noise of the transformed input, [K]; None without noise.
        damping: As in `inverse_factor`.
        act_order: As in `inverse_factor`.

    Raises:
        UserError: As `inverse_factor`.
    """
    factor = inverse_factor(hessian, damping=damping, act_order=act_order, noise=noise)
    return RoundingProblem(W, transform, transform.weight(W), hessian, noise, factor)


def with_damping(problem: RoundingProblem, damping: float, *, act_order: bool) -> RoundingProblem:
    """The same problem under another damping. Raises UserError as `inverse_factor`."""
    factor = inverse_factor(problem.hessian, damping=damping, act_order=act_order, noise=problem.noise)
    return replace(problem, factor=factor)


def select_rows(problem: RoundingProblem, rows: Tensor) -> RoundingProblem:
    """The same problem for some of the outputs, int64 [M]."""
    return replace(problem, W=problem.W[rows], transformed=problem.transformed[rows])


def initial_branch(problem: RoundingProblem, searched: Branch, *, seed: int) -> Branch:
    """The branch before there are codes.

    Args:
        problem: The rounding problem.
        searched: The branch of the transform search; its rank is kept, and its `proj_up` is the starting point.
        seed: Seed of the sketch.

    Returns:
        With noise the branch that leaves the smallest error to it, without noise `searched`.

    Raises:
        UserError: As `weighted_low_rank_factors`.
    """
    if problem.noise is None:
        return searched
    D, proj_up = problem.noise[:, None], searched[1]

    def times_noise_error(thin: Tensor) -> Tensor:
        """(D - D (H + D)^-1 D) @ thin."""
        noisy = D * thin
        return noisy - D * problem.factor.divide(noisy.T).T

    factors = weighted_low_rank_factors(
        problem.transformed, times_noise_error, proj_up.shape[1], seed=seed, start=proj_up
    )
    return _stored(problem, *factors)


def rounded_by_gptq(
    problem: RoundingProblem,
    branch: Branch,
    scheme: QuantScheme,
    choose_scales: Callable[[Tensor], Scales],
    *,
    column_block: int = 128,
) -> QuantizedLayer:
    """The layer whose residual under a given branch is rounded by GPTQ.

    Args:
        problem: The rounding problem.
        branch: The branch as stored.
        scheme: Formats of weight and activations.
        choose_scales: Gives the static scales of the residual [N, K].
        column_block: As in `gptq`.

    Raises:
        UserError: As `gptq`.
    """
    W, transform, (proj_down, proj_up) = problem.W, problem.transform, branch
    down = _noise_aware_target(transform.weight(proj_down.T), problem.noise, problem.factor)
    rest = problem.target.addmm(proj_up.float(), down, alpha=-1)
    scales = choose_scales(rest)
    codes = gptq(rest, problem.factor, scales, scheme.weight, column_block=column_block)
    return QuantizedLayer(codes, scales, transform, proj_down, proj_up, transform.offset(W, proj_down, proj_up), scheme)


def refit_branch(problem: RoundingProblem, layer: QuantizedLayer, *, seed: int) -> QuantizedLayer:
    """The same codes with the branch that is best for them.

    The codes remain those of the residual under the old branch.

    Args:
        problem: The rounding problem.
        layer: The layer whose branch is replaced.
        seed: Seed of the sketch.

    Raises:
        UserError: As `weighted_low_rank_factors`.
    """
    lost = problem.transformed - layer.scheme.weight.decode(layer.codes, layer.scales)
    rank = layer.proj_down.shape[1]
    factors = weighted_low_rank_factors(lost, problem.times_hessian, rank, seed=seed, start=layer.proj_up)
    proj_down, proj_up = _stored(problem, *factors)
    offset = problem.transform.offset(problem.W, proj_down, proj_up)
    return replace(layer, proj_down=proj_down, proj_up=proj_up, offset=offset)


def _noise_aware_target(X: Tensor, noise: Tensor | None, factor: InverseFactor) -> Tensor:
    """X H (H + D)^-1 = X - X D (H + D)^-1, for X [M, K]."""
    return X if noise is None else X - factor.divide(X * noise)


def _stored(problem: RoundingProblem, down: Tensor, up: Tensor) -> Branch:
    """A branch of the transformed weight as it is stored; a rotation is its own inverse."""
    return stored_branch(problem.transform.rotate(down), up, problem.transform.smooth)
