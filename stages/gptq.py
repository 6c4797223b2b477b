"""gptq@E: round what the branch left with GPTQ, and fit the branch to what rounding lost, in turn."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from stages import artifacts
from stages.blocks import Block, Factors, Record, precision_of, run_blocks, site_branch, site_transform
from stages.common import Expert, ParamsFile, Stage, open_stage
from stepquant.calibration.activations import FEW_TOKENS, site_folder, tokens_per_column
from stepquant.commands import command, main
from stepquant.formats import Scales, pack_nibbles, weight_scales
from stepquant.models.sites import WAN_SITES, Site
from stepquant.quantize.clip import UNCLIPPED, clip_errors
from stepquant.quantize.damping import judged_rows, search_damping
from stepquant.quantize.layer import LayerFactors, Precision, rounding_noise
from stepquant.quantize.refine import Problem, first_branch, pose, refit_branch, rounded_by_gptq, with_rows
from stepquant.quantize.scales import scales_by_error

READS = ("compute", "format", "lowrank", "gptq")


@command
def gptq(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Round the residual of each site to 4 bits with GPTQ, and refit the branch to what that lost.

    Reads the params sections compute, format, lowrank and gptq (with this expert's overrides), artifacts/model,
    artifacts/activations/EXPERT.zarr and artifacts/lowrank/EXPERT/. Writes artifacts/residual/EXPERT/.
    """
    with open_stage(__file__, READS, params, expert=expert) as stage:
        sources = {"activations": artifacts.activations(expert), "lowrank": artifacts.lowrank(expert)}
        for site in WAN_SITES:
            warn_of_few_tokens(expert, site)
        run_blocks(stage, expert, sources, artifacts.residual(expert), partial(round_site, stage, expert))


def round_site(stage: Stage, expert: str, block: Block, site: Site) -> tuple[Factors, Record]:
    """Packed codes [N, K/2] and scales of one site's residual, the branch that goes with them, and what the mean contributes [N]."""
    problem, errors = damped_problem(stage, block, site)
    factor = problem.factor
    if factor.retries:
        where = f"gptq@{expert} block {block.index} {site.name}"
        warn(f"{where}: Cholesky failed {factor.retries} times; damping raised to {factor.damping:g}")
    layer = rounded_in_turn(stage, problem, start_branch(stage, problem, site_branch(block, site, "lowrank")))
    record = {"damping": factor.damping, "dampings": stage["gptq"].dampings, "validation_errors": errors}
    return stored_factors(layer), record | {"retries": factor.retries, "dead_channels": factor.dead}


def damped_problem(stage: Stage, block: Block, site: Site) -> tuple[Problem, list[float]]:
    """What is to be rounded and for which inputs, as the params want it, with the damping that validation prompts chose; and their errors."""
    settings, activations, transform = stage["gptq"], block.activations(site), site_transform(block, site)
    moments, noise = transform.moments(activations.second_moment_about(transform.mean)), None
    if settings.noise:
        noise = settings.noise * rounding_noise(activations.search, transform, precision_of(stage["format"]))
    W, branch = block.weight(site), site_branch(block, site, "lowrank")
    tokens, rows = activations.validation if len(settings.dampings) > 1 else [], judged_rows(W, stage["lowrank"].rank)

    def error(problem: Problem) -> float:
        """Mean square of the relative output error over bins, of some rows rounded once."""
        part = with_rows(problem, rows)
        layer = round_under(stage, part)(*start_branch(stage, part, (branch[0], branch[1][rows])))
        return clip_errors(tokens, part.W, layer, [UNCLIPPED]).square().mean().item()

    # The first problem has no name here: the search lets go of it once a better one is found, 0.8 GB at 13,824 channels.
    first = partial(pose, W, transform, moments, noise, damping=settings.dampings[0], act_order=settings.act_order)
    return search_damping(first(), settings.dampings, error, act_order=settings.act_order)


def start_branch(stage: Stage, problem: Problem, searched: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The branch before there are codes: the one that stage lowrank searched with, or the one that leaves least to lose to noise."""
    settings = stage["lowrank"]
    return searched if problem.noise is None else first_branch(problem, settings.rank, seed=settings.seed, start=searched[1])


def rounded_in_turn(stage: Stage, problem: Problem, branch: tuple[torch.Tensor, torch.Tensor]) -> LayerFactors:
    """The layer rounded under a first branch (as stored), then branch and codes in turn as often as the params say."""
    lowrank, rounded = stage["lowrank"], round_under(stage, problem)
    layer = rounded(*branch)
    for i in range(stage["gptq"].refits if lowrank.rank else 0):
        if i > 0:
            layer = rounded(layer.proj_down, layer.proj_up)
        layer = refit_branch(problem, layer, seed=lowrank.seed)
    return layer


def round_under(stage: Stage, problem: Problem) -> Callable[[torch.Tensor, torch.Tensor], LayerFactors]:
    """GPTQ of what a branch (proj_down, proj_up) leaves, with scales as the params want them."""
    settings, precision = stage["gptq"], precision_of(stage["format"])
    choose = partial(choose_scales, settings.scales, precision)
    return partial(rounded_by_gptq, problem, precision=precision, choose_scales=choose, block_size=settings.block_size)


def stored_factors(layer: LayerFactors) -> Factors:
    """What of a finished layer goes into the out; `blocks.site_layer` reads it."""
    factors = {"codes": pack_nibbles(layer.codes), "scales": layer.scales.group, "offset": layer.offset}
    factors |= {"proj_down": layer.proj_down, "proj_up": layer.proj_up}
    return factors if layer.scales.tensor is None else factors | {"tensor_scale": layer.scales.tensor}


def warn_of_few_tokens(expert: str, site: Site) -> None:
    """Say so when second moments rest on so few tokens that GPTQ fits their noise (docs/calibration.md)."""
    found = tokens_per_column(site_folder(artifacts.activations(expert), 0, site.name))
    if found < FEW_TOKENS:
        remedy = "raise trajectories.calibration_prompts"
        warn(f"gptq@{expert} {site.name}: {found:.1f} calibration tokens per column, fewer than {FEW_TOKENS}; {remedy}")


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def choose_scales(rule: str, precision: Precision, residual: torch.Tensor) -> Scales:
    """Static scales of a residual [N, K]."""
    if rule == "error":
        return scales_by_error(precision.weight, residual)
    return weight_scales(precision.weight, residual, rounding=precision.weight_rounding)


if __name__ == "__main__":
    main(gptq)
