"""lowrank@E: each site's input transform (mean, smoothing, rotation), and its low-rank branch (q/k/v jointly)."""

from functools import partial
from pathlib import Path
from typing import Any

from stages import _artifacts as artifacts
from stages._blocks import run_blocks
from stages._stage import Expert, ParamsFile, Place, described_model, open_stage
from stepquant.calibration.stored_block import StoredBlock
from stepquant.command_runner import command, main
from stepquant.models.sites import Site
from stepquant.recipe.factor import factor_site
from stepquant.recipe.settings import FactorSettings
from stepquant.recipe.shapes import check_shapes
from stepquant.recipe.site_files import TransformFactors

READS = ("compute", "format", "smooth", "center", "rotate", "lowrank")


@command
def lowrank(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Search smoothing and rotation of each site, and factor its weight into a low-rank branch and a residual.

    Reads the params sections compute, format, smooth, center, rotate and lowrank (with this expert's overrides),
    artifacts/model and artifacts/activations/EXPERT.zarr. Writes artifacts/lowrank/EXPERT/.
    """
    with open_stage(__file__, READS, params, expert=expert, device=Place.WORKERS) as stage:
        settings = FactorSettings(stage["format"], stage["smooth"], stage["center"], stage["rotate"], stage["lowrank"])
        manifest = described_model()
        check_shapes(manifest, expert, settings.format, settings.lowrank.rank, settings.rotate)
        sources = {"activations": artifacts.activations(expert)}
        work, means = partial(factor, settings), settings.center.means
        run_blocks(stage, manifest, expert, sources, artifacts.lowrank(expert), work, mean_subtraction=means)


def factor(settings: FactorSettings, block: StoredBlock, site: Site) -> tuple[TransformFactors, dict[str, Any]]:
    """Transform and low-rank branch of one site of a block, and the record of the search."""
    return factor_site(block.weight(site), block.statistics(site), settings)


if __name__ == "__main__":
    main(lowrank)
