"""capture@E: replay the recorded calls of one expert block by block, and keep statistics per site and timestep bin.

calibration/replay.py says how the work is cut. A shard of a block range is a unit that any worker can make; a block's statistics
are a unit that ends up in the out. Shards are dropped once nothing needs them.

The size of a shard is a parameter, and does not follow from the number of workers, because sums depend on where they are
cut: this way one worker and many give the same bytes, and a killed capture goes on inside a block range. The price is
host memory for a shard's hidden states, 0.34 GB a call (480 x 832, 81 frames), and sums on disk, 1.4 GB per shard of a
block that is 5120 wide; more blocks in a shard write hidden states less often, and lose more when killed.
"""

from functools import partial
from pathlib import Path
from typing import Any

from stages import _artifacts as artifacts
from stages._stage import Expert, ParamsFile, Place, Stage, open_stage
from stepquant.calibration.replay import Shard, add_up_shards, cut_ranges, replayed_calls
from stepquant.calibration.statistics_files import block_name
from stepquant.calibration.trajectories import Trajectories
from stepquant.command_runner import command, main
from stepquant.compute.executor import Executor
from stepquant.compute.progress import Meter, meter
from stepquant.compute.task import Task
from stepquant.compute.units import Unit, gather
from stepquant.models.bins import Bins, expert_bins
from stepquant.models.manifest import ModelManifest, read_manifest
from stepquant.storage.json_files import to_json
from stepquant.storage.zarr_groups import group_metadata

READS = ("compute", "bins", "capture", "storage")


@command
def capture(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Replay one expert's recorded calls block by block and keep statistics of each site's input, per timestep bin.

    Reads the params sections compute, bins (this expert's), capture and storage, artifacts/model and artifacts/trajectories.zarr.
    Writes artifacts/activations/EXPERT.zarr.
    """
    with open_stage(__file__, READS, params, expert=expert, device=Place.WORKERS) as stage:
        manifest = read_manifest(artifacts.MODEL)
        described = manifest.expert(expert)
        bins = expert_bins(stage["bins"].by_expert, expert, described.t_range)
        block_ranges = cut_ranges(described.blocks, stage["capture"].blocks_per_shard)
        replay = Replay(stage, manifest, expert, bins, block_ranges)
        with (
            stage.executor() as executor,
            meter(f"capture@{expert}", len(block_ranges) * len(replay.shards)) as progress,
        ):
            units = {
                block_name(i): unit
                for n in range(len(block_ranges))
                for i, unit in replay.statistics(n, executor, progress).items()
            }
        contents = {"bin_edges": bins.edges, "blocks": {name: unit.digest for name, unit in units.items()}}
        texts = {"zarr.json": group_metadata({"expert": expert}), "manifest.json": to_json(contents)}
        gather(units, artifacts.activations(expert), texts)


class Replay:
    """The calls of one expert on their way through its blocks, as seen by the process that hands out the work."""

    def __init__(self, stage: Stage, manifest: ModelManifest, expert: str, bins: Bins, block_ranges: list[range]):
        trajectories, settings = Trajectories(artifacts.TRAJECTORIES), stage["capture"]
        self.stage, self.block_ranges = stage, block_ranges
        self.shards = cut_ranges(len(replayed_calls(trajectories, expert, bins, settings)), settings.calls_per_shard)
        self.inputs = {
            "model": manifest.expert_digest(expert),
            "trajectories": trajectories.digest(),
            "bins": bins.edges,
        }
        self.work: Any = partial(Shard, expert, manifest, artifacts.TRAJECTORIES, stage["compute"], settings, bins)

    def statistics(self, n: int, executor: Executor, progress: Meter) -> dict[int, Unit]:
        """The finished units of the statistics of the n-th block range; the range before it is made only if it has to be."""
        keys = {
            i: self.stage.key(("compute", "capture", "storage"), block=i, **self.inputs) for i in self.block_ranges[n]
        }
        found = {i: self.stage.units.find(key) for i, key in keys.items()}
        if None in found.values():
            folders = [unit.folder for unit in self._make_shards(n, executor, progress)]
            for i, key in keys.items():
                found[i] = self.stage.units.make(
                    key, partial(add_up_shards, folders, block_name(i), self.stage["storage"].url)
                )
        else:
            progress.skip(len(self.shards))
        for done in (n - 1, n) if n == len(self.block_ranges) - 1 else (n - 1,):
            for calls in self.shards if done >= 0 else ():
                self.stage.units.drop(self._shard_key(done, calls))
        return {i: unit for i, unit in found.items() if unit is not None}

    def _make_shards(self, n: int, executor: Executor, progress: Meter) -> list[Unit]:
        """The finished shards of one block range, in the order of their calls."""
        previous = self._outputs(n - 1, executor, progress)
        tasks = [
            Task(self._shard_key(n, calls), self.work(self.block_ranges[n], calls, outputs))
            for calls, outputs in zip(self.shards, previous)
        ]
        return executor.map_units(self.stage.units, tasks, progress)

    def _outputs(self, n: int, executor: Executor, progress: Meter) -> list[Path | None]:
        """Where each shard's outputs of a block range are, None before the first; the range is made again if they have been lost."""
        if n < 0:
            return [None] * len(self.shards)
        found = [self.stage.units.find(self._shard_key(n, calls)) for calls in self.shards]
        if None in found:
            progress.extend(len(self.shards))
            return [unit.folder for unit in self._make_shards(n, executor, progress)]
        return [unit.folder for unit in found if unit is not None]

    def _shard_key(self, n: int, calls: range) -> str:
        blocks = self.block_ranges[n]
        return self.stage.key(
            ("compute", "capture"), shard_of=[blocks.start, blocks.stop], calls=[calls.start, calls.stop], **self.inputs
        )


if __name__ == "__main__":
    main(capture)
