"""capture@E: replay the recorded calls of one expert block by block, and keep statistics per site and bin.

A block's calls are cut into shares of `capture.calls_per_share`, each of which is a unit that any worker can make: it runs
its calls through the block, keeps their outputs for the next block, and the sums of their statistics. Adding up the shares
in their order gives the block's statistics, a unit that ends up in the out. Shares are dropped once nothing needs them.

The size of a share is a parameter, and does not follow from the number of workers, because sums depend on where they are
cut: this way one worker and many give the same bytes, and a killed capture goes on in the middle of a block. The price
is the sums on disk, 1.4 GB per share of a block that is 5120 wide, beside 0.34 GB of outputs per call (480 x 832, 81
frames): shares of 64 calls add 6 %.

    <share>/hidden_states.<first call>.safetensors   a chunk's outputs [B, T, D]
    <share>/<site>.safetensors                       sums and samples (calibration/statistics.py)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages import artifacts
from stages.common import Expert, ParamsFile, Stage, open_stage, read_json, to_json
from stages.expert import check_expert, open_expert
from stepquant.calibration.activations import block_name
from stepquant.calibration.arrays import group_metadata
from stepquant.calibration.capture import replay_block
from stepquant.calibration.statistics import SitePlan, SiteStatistics, plan_site, write_statistics
from stepquant.calibration.trajectories import Call, Trajectories, spread_over_bins
from stepquant.commands import command, main
from stepquant.compute.executor import Executor
from stepquant.compute.progress import Meter, meter
from stepquant.compute.task import Task
from stepquant.compute.units import Unit, gather
from stepquant.errors import UserError
from stepquant.models.bins import Bins, make_bins
from stepquant.models.denoiser import BlockInputs, Denoiser, block_inputs
from stepquant.models.sites import WAN_SITES
from stepquant.models.source import expert_digest
from stepquant.params import Capture, Compute

READS = ("compute", "bins", "capture")


@command
def capture(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Replay one expert's recorded calls block by block and keep what each site sees, per timestep bin.

    Reads the params sections compute, bins (this expert's) and capture, artifacts/model and artifacts/trajectories.zarr.
    Writes artifacts/activations/EXPERT.zarr.
    """
    with open_stage(__file__, READS, params, expert=expert) as stage:
        manifest = read_json(artifacts.MODEL)
        check_expert(manifest, expert)
        blocks = manifest["experts"][expert]["blocks"]
        trajectories = Trajectories(artifacts.TRAJECTORIES)
        bins = expert_bins(stage["bins"], manifest, expert)
        ranges = share_ranges(len(replayed_calls(trajectories, expert, bins, stage["capture"])), stage["capture"].calls_per_share)
        with stage.executor() as executor, meter(f"capture@{expert}", blocks * len(ranges)) as progress:
            replay = Replay(stage, manifest, expert, bins, trajectories.digest(), ranges, executor, progress)
            units = {block_name(i): replay.statistics(i, last=i == blocks - 1) for i in range(blocks)}
        contents = {"bin_edges": replay.bins.edges, "blocks": {name: unit.digest for name, unit in units.items()}}
        texts = {"zarr.json": group_metadata({"expert": expert}), "manifest.json": to_json(contents)}
        gather(units, artifacts.activations(expert), texts)


def replayed_calls(trajectories: Trajectories, expert: str, bins: Bins, settings: Capture) -> list[Call]:
    """The recorded calls of an expert that capture runs through its blocks."""
    return spread_over_bins(trajectories.calls(expert), bins, settings.steps_per_bin)


def share_ranges(calls: int, size: int) -> list[range]:
    """The calls of each share."""
    return [range(start, min(start + size, calls)) for start in range(0, calls, size)]


class Replay:
    """The calls of one expert on their way through its blocks, seen by the process that hands out the work."""

    def __init__(
        self, stage: Stage, manifest: dict[str, Any], expert: str, bins: Bins, trajectories: dict[str, str], ranges: list[range],
        executor: Executor, progress: Meter,
    ):
        self.stage, self.manifest, self.expert, self.bins = stage, manifest, expert, bins
        self.ranges, self.executor, self.progress = ranges, executor, progress
        self.inputs = {"model": expert_digest(manifest, expert), "trajectories": trajectories, "bins": self.bins.edges}

    def statistics(self, index: int, last: bool) -> Unit:
        """The finished unit of one block's statistics; the block before it is run only if it has to be."""
        key = self.stage.key(("compute", "capture"), block=index, **self.inputs)
        unit = self.stage.units.find(key)
        if unit is None:
            shares = self._shares(index)
            unit = self.stage.units.make(key, lambda folder: add_up(shares, folder))
        else:
            self.progress.skip(len(self.ranges))
        for done in (index - 1, index) if last else (index - 1,):
            for calls in self.ranges:
                self.stage.units.drop(self._share_key(done, calls))
        return unit

    def _shares(self, index: int) -> list[Unit]:
        """The finished shares of one block, in the order of their calls."""
        previous = self._outputs(index - 1)
        common = (self.expert, self.manifest, self.stage["compute"], self.stage["capture"], self.bins, index)
        work = [Share(*common, calls, outputs) for calls, outputs in zip(self.ranges, previous)]
        tasks = [Task(self._share_key(index, share.calls), share) for share in work]
        return self.executor.map_units(self.stage.units, tasks, self.progress)

    def _outputs(self, index: int) -> list[Path | None]:
        """Where each share's outputs of a block are, None before the first; the block is run again if they have been lost."""
        if index < 0:
            return [None] * len(self.ranges)
        found = [self.stage.units.find(self._share_key(index, calls)) for calls in self.ranges]
        if None in found:
            self.progress.extend(len(self.ranges))
            found = self._shares(index)
        return [unit.folder for unit in found]

    def _share_key(self, index: int, calls: range) -> str:
        return self.stage.key(("compute", "capture"), share_of=index, calls=[calls.start, calls.stop], **self.inputs)


@dataclass(frozen=True)
class Share:
    """The work of one share: some of an expert's calls through one block. previous: the same calls' share of the block before."""

    expert: str
    manifest: dict[str, Any]
    compute: Compute
    capture: Capture
    bins: Bins
    block: int
    calls: range
    previous: Path | None

    def __call__(self, folder: Path) -> None:
        trajectories = Trajectories(artifacts.TRAJECTORIES)
        calls = replayed_calls(trajectories, self.expert, self.bins, self.capture)
        model = open_expert(self.manifest, self.expert, self.compute)
        statistics: dict[str, SiteStatistics] = {}

        def see(site: str, x: torch.Tensor, positions: range) -> None:
            if site not in statistics:
                where = f"{self.expert} block {self.block} {site}"
                statistics[site] = SiteStatistics(x.shape[-1], self._plan(site, calls, x.shape[1]), x.device.type, where)
            statistics[site].add(x, [calls[i] for i in positions], positions)

        batches = self._batches(trajectories, calls, load_prologue(model.weights.folder.absolute(), model.device, model.dtype))
        for positions, output in replay_block(model.block(self.block), WAN_SITES, batches, see):
            save_file({"hidden_states": output.cpu()}, folder / hidden_states(positions))
        for site, found in statistics.items():
            save_file(found.tensors(), folder / f"{site}.safetensors")

    def _batches(self, trajectories: Trajectories, calls: list[Call], prologue: torch.nn.Module) -> Iterator[tuple[range, BlockInputs]]:
        """Inputs of the block: what stands before the blocks is cheap and run again, hidden states come from disk."""
        for chunk in share_ranges(len(self.calls), self.capture.calls_per_chunk):
            positions = self.calls[chunk.start : chunk.stop]
            inputs = block_inputs(prologue, *trajectories.inputs([calls[i] for i in positions]))
            if self.previous is not None:
                stored = load_file(self.previous / hidden_states(positions))["hidden_states"]
                inputs = inputs.with_hidden_states(stored.to(inputs.hidden_states.device))
            yield positions, inputs

    def _plan(self, name: str, calls: list[Call], tokens: int) -> SitePlan:
        site = next(s for s in WAN_SITES if s.name == name)
        samples = {"calibration": self.capture.search_tokens, "heldout": self.capture.heldout_tokens}
        return plan_site(calls, self.bins if site.depends_on_timestep else None, tokens, samples, self.capture.seed)


@lru_cache(maxsize=1)
def load_prologue(folder: Path, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """An expert's prologue, kept for the next share: at the real size, loading it takes as long as several calls."""
    return Denoiser(folder, device, dtype).prologue()


def hidden_states(positions: range) -> str:
    """The file of a chunk's outputs in its share."""
    return f"hidden_states.{positions.start:06d}.safetensors"


def add_up(shares: list[Unit], folder: Path) -> None:
    """A block's statistics, one Zarr group per site, from its shares; one share's sums of one site in memory at a time."""
    for site in WAN_SITES:
        write_statistics(folder / site.name, (load_file(share.folder / f"{site.name}.safetensors") for share in shares))


def expert_bins(bins: Any, manifest: dict[str, Any], expert: str) -> Bins:
    """The expert's bins over its range of t."""
    if expert not in bins.model_extra:
        raise UserError(f"params: missing key 'bins.{expert}'")
    low, high = manifest["experts"][expert]["t_range"]
    return make_bins(bins.model_extra[expert], low, high, f"bins.{expert}")


if __name__ == "__main__":
    main(capture)
