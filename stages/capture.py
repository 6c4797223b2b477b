"""capture@E: replay the recorded calls of one expert block by block, and keep statistics per site and timestep bin.

calibration/replay.py describes how the work is divided. Two kinds of units run on the workers: a shard of the calls
through a block range, and the merged statistics of one block, which are gathered into the out. Shards are removed when
they are no longer needed.

The shard size is a parameter and does not follow from the number of workers, because floating-point sums depend on
where they are divided. So any number of workers gives the same bytes, and a killed capture continues inside a block
range. The cost is host memory for a shard's hidden states, 0.34 GB per call (480 x 832, 81 frames), and sums on disk,
1.4 GB per shard of a block that is 5120 wide. More blocks per range write hidden states less often, but lose more work
when killed.
"""

from functools import partial
from pathlib import Path
from typing import Any

from stages import _artifacts as artifacts
from stages._stage import Expert, ParamsFile, Place, Stage, described_model, open_stage
from stepquant.calibration.caption_replay import CaptionShard
from stepquant.calibration.replay import Shard, add_up_shards, cut_ranges, replayed_calls
from stepquant.calibration.statistics_files import block_name
from stepquant.calibration.trajectories import Trajectories
from stepquant.command_runner import command, main
from stepquant.compute.executor import Executor
from stepquant.compute.progress import Meter, meter
from stepquant.compute.task import Task
from stepquant.compute.units import Unit, gather
from stepquant.models.bins import Bins, expert_bins
from stepquant.models.manifest import ModelManifest
from stepquant.storage.json_files import to_json
from stepquant.storage.zarr_groups import group_metadata

READS = ("compute", "bins", "capture", "storage")


@command
def capture(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Replay one expert's recorded calls block by block and keep statistics of each site's input, per timestep bin.

    Reads the params sections compute, bins (this expert's), capture and storage, artifacts/model and
    artifacts/trajectories.zarr. Writes artifacts/activations/EXPERT.zarr.
    """
    with open_stage(__file__, READS, params, expert=expert, device=Place.WORKERS) as stage:
        manifest = described_model()
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
    """Distributes the replay of one expert's calls: block range by block range, the shards of a range in parallel.

    Args:
        stage: the running stage.
        manifest: the source model.
        expert: name of the expert.
        bins: the expert's bins.
        block_ranges: all blocks, divided into ranges.
    """

    def __init__(self, stage: Stage, manifest: ModelManifest, expert: str, bins: Bins, block_ranges: list[range]):
        trajectories, settings = Trajectories(artifacts.TRAJECTORIES), stage["capture"]
        self.stage, self.block_ranges = stage, block_ranges
        self.sites = manifest.expert(expert).ordered_sites
        self.captions = trajectories.caption_count
        self.shards = cut_ranges(len(replayed_calls(trajectories, expert, bins, settings)), settings.calls_per_shard)
        self.inputs = {
            "model": manifest.expert_digest(expert),
            "trajectories": trajectories.digest(),
            "bins": bins.edges,
        }
        common = (expert, manifest, artifacts.TRAJECTORIES, stage["compute"], settings, bins)
        self.work: Any = partial(Shard, *common)
        self.caption_work: Any = partial(CaptionShard, *common)

    def statistics(self, n: int, executor: Executor, progress: Meter) -> dict[int, Unit]:
        """The statistics of a block range.

        The shards of the range, and of the range before it, are computed only if statistics are missing.

        Args:
            n: index of the block range.
            executor: runs the units.
            progress: counts shards.

        Returns:
            The finished unit of every block of the range, by block index.
        """
        keys = {
            i: self.stage.key(("compute", "capture", "storage"), block=i, **self.inputs) for i in self.block_ranges[n]
        }
        if all(self.stage.units.find(key) for key in keys.values()):
            folders: dict[str, list[Path]] = {}
            progress.skip(len(self.shards))
        else:
            folders = self._folders(n, executor, progress)
        url = self.stage["storage"].url
        tasks = [Task(key, partial(add_up_shards, folders, block_name(i), url)) for i, key in keys.items()]
        units = executor.map_units(self.stage.units, tasks, _Uncounted())
        for done in (n - 1, n) if n == len(self.block_ranges) - 1 else (n - 1,):
            for calls in self.shards if done >= 0 else ():
                self.stage.units.drop(self._shard_key(done, calls))
        self.stage.units.drop(self._captions_key(n))
        return dict(zip(keys, units))

    def _folders(self, n: int, executor: Executor, progress: Meter) -> dict[str, list[Path]]:
        """By site: the finished units of a block range that observed it, in the order of their calls."""
        shards = [unit.folder for unit in self._make_shards(n, executor, progress)]
        captions: list[Path] = []
        if self.captions:
            task = Task(self._captions_key(n), self.caption_work(self.block_ranges[n]))
            captions = [unit.folder for unit in executor.map_units(self.stage.units, [task], _Uncounted())]
        return {site.name: shards + captions * site.text_alone for site in self.sites}

    def _make_shards(self, n: int, executor: Executor, progress: Meter) -> list[Unit]:
        """The finished shards of one block range, in the order of their calls."""
        previous = self._outputs(n - 1, executor, progress)
        tasks = [
            Task(self._shard_key(n, calls), self.work(self.block_ranges[n], calls, outputs))
            for calls, outputs in zip(self.shards, previous)
        ]
        return executor.map_units(self.stage.units, tasks, progress)

    def _outputs(self, n: int, executor: Executor, progress: Meter) -> list[Path | None]:
        """Folders with each shard's outputs of a block range, None before the first; lost ones are computed again."""
        if n < 0:
            return [None] * len(self.shards)
        found = [self.stage.units.find(self._shard_key(n, calls)) for calls in self.shards]
        if None in found:
            progress.extend(len(self.shards))
            return [unit.folder for unit in self._make_shards(n, executor, progress)]
        return [unit.folder for unit in found if unit is not None]

    def _captions_key(self, n: int) -> str:
        blocks = self.block_ranges[n]
        return self.stage.key(("compute", "capture"), captions_of=[blocks.start, blocks.stop], **self.inputs)

    def _shard_key(self, n: int, calls: range) -> str:
        blocks = self.block_ranges[n]
        return self.stage.key(
            ("compute", "capture"), shard_of=[blocks.start, blocks.stop], calls=[calls.start, calls.stop], **self.inputs
        )


class _Uncounted:
    """A meter for merging, which is short: counted among the shards it would spoil the estimate of the time left."""

    def step(self) -> None:
        pass

    def skip(self, count: int) -> None:
        pass

    def extend(self, count: int) -> None:
        pass


if __name__ == "__main__":
    main(capture)
