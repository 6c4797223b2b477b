"""Round one site: GPTQ of the residual, in turn with refits of the low-rank branch, under a damping chosen on validation prompts."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from stepquant.formats import Scales, weight_scales
from stepquant.quantize.alternate import (
    RoundingProblem,
    initial_branch,
    make_problem,
    refit_branch,
    rounded_by_gptq,
    select_rows,
)
from stepquant.quantize.clip import UNCLIPPED, clip_errors
from stepquant.quantize.damping import search_damping, validation_rows
from stepquant.quantize.quantized_layer import QuantizedLayer, QuantScheme, rounding_noise
from stepquant.quantize.weight_scales import scales_by_error
from stepquant.recipe.settings import RoundSettings, quant_scheme
from stepquant.recipe.site_files import ResidualFactors, TransformFactors
from stepquant.recipe.site_statistics import SiteStatistics

Branch = tuple[Tensor, Tensor]  # proj_down [K, R] and proj_up [N, R], bfloat16 as stored


def round_site(
    W: Tensor, statistics: SiteStatistics, factors: TransformFactors, settings: RoundSettings
) -> tuple[ResidualFactors, dict[str, Any]]:
    """Round what the low-rank branch left of W [N, K], and refit the branch to what that lost.

    Returns what is stored, and a record in JSON types: the damping, its candidates' validation errors, how often Cholesky
    failed before ("retries"), and the number of dead channels. Raises UserError if no damping makes the Hessian positive definite.
    """
    problem, errors = damped_problem(W, statistics, factors, settings)
    layer = alternate(problem, start_branch(problem, factors.branch, settings), settings)
    factor = problem.factor
    record = {"damping": factor.damping, "dampings": settings.gptq.dampings, "validation_errors": errors}
    return ResidualFactors.of_layer(layer), record | {"retries": factor.retries, "dead_channels": factor.dead}


def damped_problem(
    W: Tensor, statistics: SiteStatistics, factors: TransformFactors, settings: RoundSettings
) -> tuple[RoundingProblem, list[float]]:
    """The rounding problem of W [N, K] under the damping with the smallest error on validation tokens, and the errors tried."""
    gptq, transform, branch = settings.gptq, factors.transform, factors.branch
    hessian, noise = transform.hessian(statistics.hessian_about(transform.mean)), None
    if gptq.noise:
        noise = gptq.noise * rounding_noise(statistics.search, transform, quant_scheme(settings.format))
    tokens, rows = statistics.validation if len(gptq.dampings) > 1 else [], validation_rows(W, settings.lowrank.rank)

    def error(problem: RoundingProblem) -> float:
        """Mean square of the relative output error over bins, of some rows rounded once."""
        part = select_rows(problem, rows)
        layer = round_under(part, settings)(*start_branch(part, (branch[0], branch[1][rows]), settings))
        return clip_errors(tokens, part.W, layer, [UNCLIPPED]).square().mean().item()

    # The first problem has no name here: the search frees it once a better one is found, 0.8 GB at 13,824 channels.
    first = partial(make_problem, W, transform, hessian, noise, damping=gptq.dampings[0], act_order=gptq.act_order)
    return search_damping(first(), gptq.dampings, error, act_order=gptq.act_order)


def start_branch(problem: RoundingProblem, searched: Branch, settings: RoundSettings) -> Branch:
    """The branch before there are codes: the one of the transform search, or under noise the one that leaves least to it."""
    if problem.noise is None:
        return searched
    return initial_branch(problem, settings.lowrank.rank, seed=settings.lowrank.seed, start=searched[1])


def alternate(problem: RoundingProblem, branch: Branch, settings: RoundSettings) -> QuantizedLayer:
    """The layer rounded under a first branch, then branch and codes in turn as often as the params say."""
    rounded = round_under(problem, settings)
    layer = rounded(*branch)
    for i in range(settings.gptq.refits if settings.lowrank.rank else 0):
        if i > 0:
            layer = rounded(layer.proj_down, layer.proj_up)
        layer = refit_branch(problem, layer, seed=settings.lowrank.seed)
    return layer


def round_under(problem: RoundingProblem, settings: RoundSettings) -> Callable[[Tensor, Tensor], QuantizedLayer]:
    """GPTQ of what a branch (proj_down, proj_up) leaves, with scales as the params want them."""
    scheme = quant_scheme(settings.format)
    choose = partial(choose_scales, settings.gptq.scales, scheme)
    return partial(
        rounded_by_gptq, problem, scheme=scheme, choose_scales=choose, column_block=settings.gptq.column_block
    )


def choose_scales(rule: str, scheme: QuantScheme, residual: Tensor) -> Scales:
    """Static scales of a residual [N, K]: by each group's squared rounding error ("error"), or by its largest magnitude ("absmax")."""
    if rule == "error":
        return scales_by_error(scheme.weight, residual)
    return weight_scales(scheme.weight, residual, rounding=scheme.weight_rounding)
