"""gptq@E: round the residual with GPTQ, and refit the low-rank branch to the rounding error, alternately."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from stages import _artifacts as artifacts
from stages._blocks import run_blocks
from stages._stage import Expert, ParamsFile, Place, described_model, open_stage
from stepquant.calibration.statistics_files import site_folder, tokens_per_column
from stepquant.calibration.stored_block import StoredBlock
from stepquant.command_runner import command, main
from stepquant.models.sites import Site
from stepquant.recipe.round import round_site
from stepquant.recipe.settings import RoundSettings
from stepquant.recipe.site_files import ResidualFactors
from stepquant.recipe.site_statistics import FEW_TOKENS, more_tokens

READS = ("compute", "format", "lowrank", "gptq")


@command
def gptq(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Round the residual of each site to 4 bits with GPTQ, and refit the low-rank branch to the rounding error.

    Reads the params sections compute, format, lowrank and gptq (with this expert's overrides), artifacts/model,
    artifacts/activations/EXPERT.zarr and artifacts/lowrank/EXPERT/. Writes artifacts/residual/EXPERT/.
    """
    with open_stage(__file__, READS, params, expert=expert, device=Place.WORKERS) as stage:
        sources = {"activations": artifacts.activations(expert), "lowrank": artifacts.lowrank(expert)}
        manifest = described_model()
        for site in manifest.expert(expert).ordered_sites:
            warn_of_few_tokens(expert, site)
        settings = RoundSettings(stage["format"], stage["lowrank"], stage["gptq"])
        work = partial(round_residual, settings, expert)
        run_blocks(stage, manifest, expert, sources, artifacts.residual(expert), work)


def round_residual(
    settings: RoundSettings, expert: str, block: StoredBlock, site: Site
) -> tuple[ResidualFactors, dict[str, Any]]:
    """The rounded residual and the refitted branch of one site of a block, and the record of the search."""
    found, record = round_site(block.weight(site), block.statistics(site), block.transform_factors(site), settings)
    if record["retries"]:
        where = f"gptq@{expert} block {block.index} {site.name}"
        warn(f"{where}: Cholesky failed {record['retries']} times; damping raised to {record['damping']:g}")
    return found, record


def warn_of_few_tokens(expert: str, site: Site) -> None:
    """Warn if the Hessian comes from so few tokens that GPTQ fits their noise (docs/calibration.md)."""
    found = tokens_per_column(site_folder(artifacts.activations(expert), 0, site.name))
    if found < FEW_TOKENS:
        remedy = more_tokens(text_alone=site.text_alone)
        warn(f"gptq@{expert} {site.name}: {found:.1f} calibration tokens per column, fewer than {FEW_TOKENS}; {remedy}")


def warn(text: str) -> None:
    """Print a warning; it is passed on from workers."""
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    main(gptq)
