"""gptq@E: round what the branch left over with GPTQ, against the second moments of the smoothed input."""

import sys
from pathlib import Path

from stages import artifacts
from stages.blocks import Block, Factors, Record, precision_of, run_blocks
from stages.common import Expert, ParamsFile, Stage, open_stage
from stepquant.commands import command, main
from stepquant.formats import pack_nibbles, weight_scales
from stepquant.models.sites import Site
from stepquant.quantize.gptq import gptq as round_weight
from stepquant.quantize.lowrank import residual

READS = ("compute", "format", "gptq")


@command
def gptq(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Round the residual of each site to 4 bits with GPTQ.

    Reads the params sections compute, format and gptq (with this expert's overrides), artifacts/model,
    artifacts/activations/EXPERT.zarr and artifacts/lowrank/EXPERT/. Writes artifacts/residual/EXPERT/.
    """
    with open_stage(__file__, READS, params, expert=expert) as stage:
        sources = {"activations": artifacts.activations(expert), "lowrank": artifacts.lowrank(expert)}
        run_blocks(stage, expert, sources, artifacts.residual(expert), lambda block, site: round_site(stage, expert, block, site))


def round_site(stage: Stage, expert: str, block: Block, site: Site) -> tuple[Factors, Record]:
    """Packed codes [N, K/2] and scales of one site's residual."""
    settings, precision = stage["gptq"], precision_of(stage["format"])
    smooth, proj_down, proj_up = (block.factor("lowrank", f"{site.name}.{name}") for name in ("smooth", "proj_down", "proj_up"))
    R = residual(block.weight(site), smooth, proj_down, proj_up)
    s = smooth.float()
    # The 4-bit weight meets x/s, so its second moments are those of x, scaled on both sides.
    H = block.activations(site).second_moment / s[:, None] / s
    scales = weight_scales(precision.weight, R, rounding=precision.weight_rounding)
    result = round_weight(R, H, scales, precision.weight, damping=settings.damping, act_order=settings.act_order, block_size=settings.block_size)
    if result.retries:
        where = f"gptq@{expert} block {block.index} {site.name}"
        print(f"{where}: Cholesky failed {result.retries} times; damping raised to {result.damping:g}", file=sys.stderr)
    factors = {"codes": pack_nibbles(result.codes), "scales": scales.group}
    if scales.tensor is not None:
        factors["tensor_scale"] = scales.tensor
    return factors, {"damping": result.damping, "retries": result.retries, "dead_channels": result.dead}


if __name__ == "__main__":
    main(gptq)
