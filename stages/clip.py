"""clip@E: search the clip of the dynamic activation scale, per site and timestep bin, on the final weights."""

from functools import partial
from pathlib import Path
from typing import Any

from stages import _artifacts as artifacts
from stages._blocks import run_blocks
from stages._stage import Expert, ParamsFile, Place, described_model, open_stage
from stepquant.calibration.stored_block import StoredBlock
from stepquant.command_runner import command, main
from stepquant.models.sites import Site
from stepquant.recipe.clip import clip_site
from stepquant.recipe.settings import ClipSettings, quant_scheme
from stepquant.recipe.site_files import ClipTable
from stepquant.storage.json_files import read_json

READS = ("compute", "format", "clip")


@command
def clip(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Search the clip of the dynamic activation scale, per site and timestep bin.

    Reads the params sections compute, format and clip (with this expert's overrides), artifacts/model,
    artifacts/activations/EXPERT.zarr, artifacts/lowrank/EXPERT/ and artifacts/residual/EXPERT/.
    Writes artifacts/clip/EXPERT/.
    """
    with open_stage(__file__, READS, params, expert=expert, device=Place.WORKERS) as stage:
        sources = {
            "activations": artifacts.activations(expert),
            "lowrank": artifacts.lowrank(expert),
            "residual": artifacts.residual(expert),
        }
        edges = read_json(sources["activations"] / "manifest.json")["bin_edges"]
        settings = ClipSettings(stage["format"], stage["clip"])
        work = partial(search_clip, settings)
        run_blocks(stage, described_model(), expert, sources, artifacts.clip(expert), work, bin_edges=edges)


def search_clip(settings: ClipSettings, block: StoredBlock, site: Site) -> tuple[ClipTable, dict[str, Any]]:
    """The clip table of one site of a block, and the record of its search."""
    layer = block.quantized_layer(site, quant_scheme(settings.format))
    return clip_site(block.weight(site), layer, block.statistics(site), settings)


if __name__ == "__main__":
    main(clip)
