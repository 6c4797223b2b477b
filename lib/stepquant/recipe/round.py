"""Rounds one site: GPTQ and low-rank refits in alternation, under a damping selected on validation prompts."""

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
from stepquant.quantize.lowrank import Branch
from stepquant.quantize.quantized_layer import QuantizedLayer, QuantScheme, rounding_noise
from stepquant.quantize.weight_scales import scales_by_error
from stepquant.recipe.settings import RoundSettings, quant_scheme
from stepquant.recipe.site_files import ResidualFactors, TransformFactors
from stepquant.recipe.site_statistics import SiteStatistics


def round_site(
    W: Tensor, statistics: SiteStatistics, factors: TransformFactors, settings: RoundSettings
) -> tuple[ResidualFactors, dict[str, Any]]:
    """Rounds the residual of a site, and refits the low-rank branch to the rounding error.

    Args:
        W: Stacked weight of the site, [N, K].
        statistics: The site's statistics, on the device of W.
        factors: Transform and first branch from `factor_site`.
        settings: Sections of params.yaml.

    Returns:
        What is stored, and a record in JSON types: the damping, the validation errors of its candidates, how often
        Cholesky failed before ("retries"), and the number of dead channels.

    Raises:
        UserError: No damping makes the Hessian positive definite or gives a finite error, or W is not finite.
    """
    problem, errors = damped_problem(W, statistics, factors, settings)
    branch = initial_branch(problem, factors.branch, seed=settings.lowrank.seed)
    layer = alternate(problem, branch, settings)
    factor = problem.factor
    record = {"damping": factor.damping, "dampings": settings.gptq.dampings, "validation_errors": errors}
    return ResidualFactors.of_layer(layer), record | {"retries": factor.retries, "dead_channels": factor.dead}


def damped_problem(
    W: Tensor, statistics: SiteStatistics, factors: TransformFactors, settings: RoundSettings
) -> tuple[RoundingProblem, list[float]]:
    """The rounding problem under the damping with the smallest error on validation tokens.

    Arguments as in `round_site`.

    Returns:
        The problem, and the errors of the dampings that were tried (none if there is only one damping).

    Raises:
        UserError: As `search_damping` and `make_problem`.
    """
    gptq, transform, (proj_down, proj_up) = settings.gptq, factors.transform, factors.branch
    hessian, noise = transform.hessian(statistics.hessian_about(transform.mean)), None
    if gptq.noise:
        noise = gptq.noise * rounding_noise(statistics.search, transform, quant_scheme(settings.format))
    tokens, rows = statistics.validation if len(gptq.dampings) > 1 else [], validation_rows(W, settings.lowrank.rank)

    def error(problem: RoundingProblem) -> float:
        """Mean square over bins of the relative output error, for some rows rounded once."""
        part = select_rows(problem, rows)
        branch = initial_branch(part, (proj_down, proj_up[rows]), seed=settings.lowrank.seed)
        layer = rounding(part, settings)(branch)
        return clip_errors(tokens, part.W, layer, [UNCLIPPED]).square().mean().item()

    # The first problem has no name here, so the search can free it once it has a better one: 0.8 GB at 13,824 channels.
    first = partial(make_problem, W, transform, hessian, noise, damping=gptq.dampings[0], act_order=gptq.act_order)
    return search_damping(first(), gptq.dampings, error, act_order=gptq.act_order)


def alternate(problem: RoundingProblem, branch: Branch, settings: RoundSettings) -> QuantizedLayer:
    """Rounds the residual under a first branch, then alternates refits of the branch with GPTQ.

    Args:
        problem: The rounding problem.
        branch: The first branch, as stored.
        settings: Sections of params.yaml; gptq.refits is the number of refits, the last of which keeps the codes.
    """
    rounded = rounding(problem, settings)
    layer = rounded(branch)
    for i in range(settings.gptq.refits if settings.lowrank.rank else 0):
        if i > 0:
            layer = rounded((layer.proj_down, layer.proj_up))
        layer = refit_branch(problem, layer, seed=settings.lowrank.seed)
    return layer


def rounding(problem: RoundingProblem, settings: RoundSettings) -> Callable[[Branch], QuantizedLayer]:
    """A function that rounds the residual under a branch by GPTQ, with scales as the settings say."""
    scheme = quant_scheme(settings.format)
    choose = partial(choose_scales, settings.gptq.scales, scheme)
    column_block = settings.gptq.column_block
    return partial(rounded_by_gptq, problem, scheme=scheme, choose_scales=choose, column_block=column_block)


def choose_scales(rule: str, scheme: QuantScheme, residual: Tensor) -> Scales:
    """Static scales of a residual.

    Args:
        rule: "error" for the smallest squared rounding error of each group, "absmax" for its largest magnitude.
        scheme: Says the weight format.
        residual: [N, K].

    Raises:
        UserError: The residual holds NaN or infinity, or the group size does not divide K.
    """
    if rule == "error":
        return scales_by_error(scheme.weight, residual)
    return weight_scales(scheme.weight, residual, rounding=scheme.weight_rounding)
