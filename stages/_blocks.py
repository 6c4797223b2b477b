"""The common part of lowrank, gptq and clip: one unit per block, from the block's weights, statistics and factors.

artifacts/<stage>/<expert>/manifest.json            {"blocks": {block: digest}, ...}
artifacts/<stage>/<expert>/<block>/...              see recipe/site_files.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stages._stage import Stage
from stepquant.calibration.statistics_files import block_name
from stepquant.calibration.stored_block import StoredBlock
from stepquant.compute.progress import meter
from stepquant.compute.task import Task
from stepquant.compute.units import gather
from stepquant.models.expert import open_expert
from stepquant.models.manifest import ModelManifest
from stepquant.models.sites import Site
from stepquant.params import Compute
from stepquant.recipe.site_files import FACTORS, RECORD, SiteRecord, block_tensors
from stepquant.storage.json_files import read_json, to_json
from stepquant.storage.read_ahead import read_ahead

SiteWork = Callable[[StoredBlock, Site], tuple[SiteRecord, dict[str, Any]]]


@dataclass(frozen=True)
class BlockWork:
    """The work of one unit: every site of one block. Any process that shares the artifacts can do it.

    Attributes:
        index: Index of the transformer block.
        expert: Name of the expert.
        manifest: The source model.
        compute: Device and dtype.
        sources: Name -> artifact that the work reads.
        work: What is done for one site.
        following: Index of the block that this worker is likely to get next; None if there is none. Its files are read
            ahead.
    """

    index: int
    expert: str
    manifest: ModelManifest
    compute: Compute
    sources: dict[str, Path]
    work: SiteWork
    following: int | None

    def __call__(self, folder: Path) -> None:
        model = open_expert(self.manifest, self.expert, self.compute)
        block, sites = StoredBlock(self.index, model, self.sources), self.manifest.expert(self.expert).ordered_sites
        if self.following is not None:
            read_ahead(StoredBlock(self.following, model, self.sources).file_ranges(sites))
        results = {site.name: self.work(block, site) for site in sites}
        save_file(block_tensors({name: stored for name, (stored, _) in results.items()}), folder / FACTORS)
        (folder / RECORD).write_text(to_json({name: record for name, (_, record) in results.items()}))


def run_blocks(
    stage: Stage,
    manifest: ModelManifest,
    expert: str,
    sources: dict[str, Path],
    out: Path,
    work: SiteWork,
    **extra: Any,
) -> None:
    """Do some work for every site of every block of an expert, and gather the blocks into the out of the stage.

    Args:
        stage: The open stage.
        manifest: The source model.
        expert: Name of the expert.
        sources: Name -> artifact that the work reads. Its manifest.json has the digests of its blocks.
        out: The out.
        work: What is done for one site. It is pickled for other processes, so it is a function of a module or a
            partial of one.
        **extra: Further entries of the out's manifest.

    Raises:
        UserError: An artifact is missing or damaged, or the work reports an error.
    """
    digests = {name: read_json(folder / "manifest.json")["blocks"] for name, folder in sources.items()}
    tasks, blocks, workers = {}, manifest.expert(expert).blocks, stage["compute"].workers
    for index in range(blocks):
        following = index + workers if index + workers < blocks else None
        name = block_name(index)
        key = stage.key(
            block=index,
            model=manifest.expert_digest(expert),
            **{source: found[name] for source, found in digests.items()},
        )
        tasks[name] = Task(key, BlockWork(index, expert, manifest, stage["compute"], sources, work, following))
    with stage.executor() as executor, meter(f"{stage.name}@{expert}", len(tasks)) as progress:
        units = dict(zip(tasks, executor.map_units(stage.units, list(tasks.values()), progress)))
    gather(
        units, out, {"manifest.json": to_json({"blocks": {name: unit.digest for name, unit in units.items()}} | extra)}
    )
