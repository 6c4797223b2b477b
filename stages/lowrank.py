"""lowrank@E: smoothing search, then the low-rank branch, per site (q/k/v jointly)."""

from pathlib import Path

import torch

from stages import artifacts
from stages.blocks import Block, Factors, Record, check_shapes, precision_of, run_blocks
from stages.common import Expert, ParamsFile, Stage, open_stage, read_json
from stages.expert import check_expert
from stepquant.commands import command, main
from stepquant.models.sites import Site
from stepquant.quantize.lowrank import low_rank_factors, stored_branch
from stepquant.quantize.smooth import search_smoothing

READS = ("compute", "format", "smooth", "lowrank")


@command
def lowrank(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Search the smoothing of each site and factor its outliers into a low-rank branch.

    Reads the params sections compute, format, smooth and lowrank (with this expert's overrides), artifacts/model and
    artifacts/activations/EXPERT.zarr. Writes artifacts/lowrank/EXPERT/.
    """
    with open_stage(__file__, READS, params, expert=expert) as stage:
        manifest = read_json(artifacts.MODEL)
        check_expert(manifest, expert)
        check_shapes(manifest, expert, stage["format"], stage["lowrank"].rank)
        sources = {"activations": artifacts.activations(expert)}
        run_blocks(stage, expert, sources, artifacts.lowrank(expert), lambda block, site: factor_site(stage, block, site))


def factor_site(stage: Stage, block: Block, site: Site) -> tuple[Factors, Record]:
    """Smoothing factor [K], proj_down [K, R] and proj_up [N, R] of one site, all bfloat16 as stored."""
    settings, branch = stage["smooth"], stage["lowrank"]
    W, activations = block.weight(site), block.activations(site)
    alphas = settings.candidates if settings.alpha == "search" else [settings.alpha]
    candidates = [(alpha, 1 - alpha if settings.beta is None else settings.beta) for alpha in alphas]
    search = search_smoothing(
        W, activations.absmax.amax(0), torch.cat(activations.search), candidates,
        rank=branch.rank, seed=branch.seed, precision=precision_of(stage["format"]),
    )
    down, up = low_rank_factors(W * search.smooth.float(), branch.rank, seed=branch.seed)
    proj_down, proj_up = stored_branch(down, up, search.smooth)
    record = {"alpha": search.alpha, "beta": search.beta, "candidates": candidates, "search_errors": search.errors}
    return {"smooth": search.smooth, "proj_down": proj_down, "proj_up": proj_up}, record


if __name__ == "__main__":
    main(lowrank)
