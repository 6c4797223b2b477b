"""lowrank@E: what is done to each site's input (mean, smoothing, rotation), and the low-rank branch (q/k/v jointly)."""

from functools import partial
from pathlib import Path

import torch

from stages import artifacts
from stages.blocks import Block, Factors, Record, check_shapes, precision_of, run_blocks
from stages.common import Expert, ParamsFile, Stage, open_stage, read_json
from stages.expert import check_expert
from stepquant.commands import command, main
from stepquant.models.sites import Site
from stepquant.quantize.learn import learn_transform
from stepquant.quantize.smooth import search_transform

READS = ("compute", "format", "smooth", "centre", "rotate", "lowrank")


@command
def lowrank(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Search smoothing and rotation of each site and factor its outliers into a low-rank branch.

    Reads the params sections compute, format, smooth, centre, rotate and lowrank (with this expert's overrides),
    artifacts/model and artifacts/activations/EXPERT.zarr. Writes artifacts/lowrank/EXPERT/.
    """
    with open_stage(__file__, READS, params, expert=expert) as stage:
        manifest = read_json(artifacts.MODEL)
        check_expert(manifest, expert)
        check_shapes(manifest, expert, stage["format"], stage["lowrank"].rank, stage["rotate"].blocks)
        sources = {"activations": artifacts.activations(expert)}
        centred = stage["centre"].means
        run_blocks(stage, expert, sources, artifacts.lowrank(expert), partial(factor_site, stage), centred=centred)


def factor_site(stage: Stage, block: Block, site: Site) -> tuple[Factors, Record]:
    """Mean and smoothing factor [K], block of the rotation, proj_down [K, R] and proj_up [N, R] of one site; bfloat16 as stored."""
    settings, branch = stage["smooth"], stage["lowrank"]
    W, activations = block.weight(site), block.activations(site)
    mean = activations.mean.mean(0) if stage["centre"].means else torch.zeros_like(activations.mean[0])
    mean = mean.to(torch.bfloat16)
    span = activations.absmax.amax(0)
    if settings.span == "rms":
        span = activations.variance_about(mean).clamp(min=0).sqrt()
    alphas = settings.candidates if settings.alpha == "search" else [settings.alpha]
    exponents = [(alpha, 1 - alpha if settings.beta is None else settings.beta) for alpha in alphas]
    rotations = stage["rotate"].blocks
    samples, layer = activations.search, {"rank": branch.rank, "seed": branch.seed, "precision": precision_of(stage["format"])}
    search = search_transform(W, torch.cat(samples), span, mean, exponents, rotations, **layer)
    # A sample is in the order of the prompts: one half of them to learn from, the other to judge by.
    learn, judge = (torch.cat(halves) for halves in zip(*(x.tensor_split(2) for x in samples)))
    search = learn_transform(W, learn, judge, search, steps=settings.gradient_steps, **layer)
    transform = search.transform
    record = {"alpha": search.alpha, "beta": search.beta, "candidates": exponents, "search_errors": search.errors, "learned": search.learned}
    record |= {"rotation": transform.rotation, "rotations": rotations, "rotation_errors": search.rotation_errors}
    factors = {"mean": transform.mean, "smooth": transform.smooth, "rotation": torch.tensor(transform.rotation)}
    return factors | {"proj_down": search.proj_down, "proj_up": search.proj_up}, record


if __name__ == "__main__":
    main(lowrank)
