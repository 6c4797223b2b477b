"""clip@E: search the clip of the dynamic activation scale, per site and timestep bin, on the final weights."""

from functools import partial
from pathlib import Path

import torch

from stages import artifacts
from stages.blocks import Block, Factors, Record, precision_of, run_blocks, site_layer
from stages.common import Expert, ParamsFile, Stage, open_stage, read_json
from stepquant.commands import command, main
from stepquant.models.sites import Site
from stepquant.quantize.clip import choose_clip, clip_candidates, clip_errors

READS = ("compute", "format", "clip")


@command
def clip(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Search, per site and timestep bin, what the activation scale is multiplied with.

    Reads the params sections compute, format and clip (with this expert's overrides), artifacts/model,
    artifacts/activations/EXPERT.zarr, artifacts/lowrank/EXPERT/ and artifacts/residual/EXPERT/. Writes artifacts/clip/EXPERT/.
    """
    with open_stage(__file__, READS, params, expert=expert) as stage:
        sources = {"activations": artifacts.activations(expert), "lowrank": artifacts.lowrank(expert), "residual": artifacts.residual(expert)}
        edges = read_json(sources["activations"] / "manifest.json")["bin_edges"]
        run_blocks(stage, expert, sources, artifacts.clip(expert), partial(clip_site, stage), bin_edges=edges)


def clip_site(stage: Stage, block: Block, site: Site) -> tuple[Factors, Record]:
    """Clip ratio and exponent offset of one site, [bins] each: the best per bin, and the best single one over all bins."""
    precision, settings = precision_of(stage["format"]), stage["clip"]
    W, layer = block.weight(site), site_layer(block, site, precision)
    candidates = clip_candidates(settings.ratios, settings.exponent_offsets, precision.activation)
    errors = clip_errors(block.activations(site).search, W, layer, candidates)
    choice = choose_clip(errors)
    ratios = torch.tensor([c.ratio for c in candidates])
    offsets = torch.tensor([c.exponent_offset for c in candidates], dtype=torch.int8)
    per_bin, single = list(choice.per_bin), [choice.single] * len(errors)
    factors = {"ratio": ratios[per_bin], "exponent": offsets[per_bin], "single_ratio": ratios[single], "single_exponent": offsets[single]}
    record = {
        "candidates": [[c.ratio, c.exponent_offset] for c in candidates],
        "search_errors": errors.tolist(),
        "chosen": per_bin,
        "single": choice.single,
    }
    return factors, record


if __name__ == "__main__":
    main(clip)
