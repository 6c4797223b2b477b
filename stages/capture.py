"""capture@E: replay the recorded calls of one expert block by block, and keep statistics per site and bin.

The work is cut both ways: into shares of `capture.calls_per_share` calls, and into runs of `capture.blocks_per_share` blocks. A
share of a run is a unit that any worker can make: it takes its calls through these blocks, one block at a time, holds
what goes from block to block in memory, keeps the last outputs for the next run, and the sums of every block's statistics.
Adding up the shares in their order gives a block's statistics, a unit that ends up in the out. Shares are dropped once
nothing needs them.

The size of a share is a parameter, and does not follow from the number of workers, because sums depend on where they are
cut: this way one worker and many give the same bytes, and a killed capture goes on inside a run of blocks. The price is
host memory for a share's hidden states, 0.34 GB a call (480 x 832, 81 frames), and sums on disk, 1.4 GB per share of a
block that is 5120 wide; more blocks in a share write hidden states less often, and lose more when killed.

    <share>/hidden_states.<first call>.safetensors   a chunk's outputs of the last block [B, T, D], if there is a block after it
    <share>/<block>/<site>.safetensors               sums and samples (calibration/statistics.py)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages import artifacts
from stages.common import Expert, ParamsFile, Stage, open_stage, read_json, to_json
from stages.expert import check_expert, open_expert
from stepquant.calibration import remote
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

READS = ("compute", "bins", "capture", "storage")


@command
def capture(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Replay one expert's recorded calls block by block and keep what each site sees, per timestep bin.

    Reads the params sections compute, bins (this expert's), capture and storage, artifacts/model and artifacts/trajectories.zarr.
    Writes artifacts/activations/EXPERT.zarr.
    """
    with open_stage(__file__, READS, params, expert=expert) as stage:
        manifest = read_json(artifacts.MODEL)
        check_expert(manifest, expert)
        trajectories = Trajectories(artifacts.TRAJECTORIES)
        bins, settings = expert_bins(stage["bins"], manifest, expert), stage["capture"]
        shares = cut(len(replayed_calls(trajectories, expert, bins, settings)), settings.calls_per_share)
        runs = cut(manifest["experts"][expert]["blocks"], settings.blocks_per_share)
        with stage.executor() as executor, meter(f"capture@{expert}", len(runs) * len(shares)) as progress:
            replay = Replay(stage, manifest, expert, bins, trajectories.digest(), shares, runs, executor, progress)
            units = {block_name(i): unit for n in range(len(runs)) for i, unit in replay.statistics(n).items()}
        contents = {"bin_edges": replay.bins.edges, "blocks": {name: unit.digest for name, unit in units.items()}}
        texts = {"zarr.json": group_metadata({"expert": expert}), "manifest.json": to_json(contents)}
        gather(units, artifacts.activations(expert), texts)


def replayed_calls(trajectories: Trajectories, expert: str, bins: Bins, settings: Capture) -> list[Call]:
    """The recorded calls of an expert that capture runs through its blocks."""
    return spread_over_bins(trajectories.calls(expert), bins, settings.steps_per_bin)


def cut(count: int, size: int) -> list[range]:
    """0 to count - 1 in pieces of `size`, the last one what is left."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


class Replay:
    """The calls of one expert on their way through its blocks, seen by the process that hands out the work."""

    def __init__(
        self, stage: Stage, manifest: dict[str, Any], expert: str, bins: Bins, trajectories: dict[str, str], shares: list[range],
        runs: list[range], executor: Executor, progress: Meter,
    ):
        self.stage, self.manifest, self.expert, self.bins = stage, manifest, expert, bins
        self.shares, self.runs, self.executor, self.progress = shares, runs, executor, progress
        self.inputs = {"model": expert_digest(manifest, expert), "trajectories": trajectories, "bins": self.bins.edges}

    def statistics(self, n: int) -> dict[int, Unit]:
        """The finished units of the statistics of the n-th run's blocks; the run before it is made only if it has to be."""
        keys = {i: self.stage.key(("compute", "capture", "storage"), block=i, **self.inputs) for i in self.runs[n]}
        found = {i: self.stage.units.find(key) for i, key in keys.items()}
        if None in found.values():
            shares = self._shares(n)
            for i, key in keys.items():
                found[i] = self.stage.units.make(key, partial(add_up, shares, block_name(i), self.stage["storage"].url))
        else:
            self.progress.skip(len(self.shares))
        for done in (n - 1, n) if n == len(self.runs) - 1 else (n - 1,):
            for calls in self.shares if done >= 0 else ():
                self.stage.units.drop(self._share_key(done, calls))
        return found

    def _shares(self, n: int) -> list[Unit]:
        """The finished shares of one run, in the order of their calls."""
        previous = self._outputs(n - 1)
        common = (self.expert, self.manifest, self.stage["compute"], self.stage["capture"], self.bins, self.runs[n])
        work = [Share(*common, calls, outputs) for calls, outputs in zip(self.shares, previous)]
        tasks = [Task(self._share_key(n, share.calls), share) for share in work]
        return self.executor.map_units(self.stage.units, tasks, self.progress)

    def _outputs(self, n: int) -> list[Path | None]:
        """Where each share's outputs of a run are, None before the first; the run is made again if they have been lost."""
        if n < 0:
            return [None] * len(self.shares)
        found = [self.stage.units.find(self._share_key(n, calls)) for calls in self.shares]
        if None in found:
            self.progress.extend(len(self.shares))
            found = self._shares(n)
        return [unit.folder for unit in found]

    def _share_key(self, n: int, calls: range) -> str:
        blocks = self.runs[n]
        return self.stage.key(("compute", "capture"), share_of=[blocks.start, blocks.stop], calls=[calls.start, calls.stop], **self.inputs)


@dataclass(frozen=True)
class Share:
    """The work of one share: some of an expert's calls through a run of blocks. previous: the same calls' share of the run before."""

    expert: str
    manifest: dict[str, Any]
    compute: Compute
    capture: Capture
    bins: Bins
    blocks: range
    calls: range
    previous: Path | None

    def __call__(self, folder: Path) -> None:
        trajectories = Trajectories(artifacts.TRAJECTORIES)
        calls = replayed_calls(trajectories, self.expert, self.bins, self.capture)
        model = open_expert(self.manifest, self.expert, self.compute)
        prologue = load_prologue(model.weights.folder.absolute(), model.device, model.dtype)
        chunks = [self.calls[chunk.start : chunk.stop] for chunk in cut(len(self.calls), self.capture.calls_per_chunk)]
        hidden: list[torch.Tensor | None] = [None] * len(chunks)
        if self.previous is not None:
            hidden = [load_file(self.previous / hidden_states(positions))["hidden_states"] for positions in chunks]

        def inputs() -> Iterator[tuple[range, BlockInputs]]:
            """What stands before the blocks is cheap and run again; hidden states come from the block before."""
            for positions, states in zip(chunks, hidden):
                found = block_inputs(prologue, *trajectories.inputs([calls[i] for i in positions]))
                yield positions, found if states is None else found.with_hidden_states(states.to(found.hidden_states.device))

        plans: dict[str, SitePlan] = {}  # the same in every block
        for index in self.blocks:
            sums = Sums(self, index, calls, plans)
            for n, (_, output) in enumerate(replay_block(model.block(index), WAN_SITES, inputs(), sums.see)):
                hidden[n] = output.cpu()  # in place of this block's input: at the real size all of them are 16 GB
            sums.save(folder / block_name(index))
        if self.blocks.stop < self.manifest["experts"][self.expert]["blocks"]:
            for positions, states in zip(chunks, hidden):
                save_file({"hidden_states": states}, folder / hidden_states(positions))


class Sums:
    """The statistics of one block's sites over one share's calls."""

    def __init__(self, share: Share, block: int, calls: list[Call], plans: dict[str, SitePlan]):
        """plans: by site, of whichever blocks were seen before; what is missing is added."""
        self.share, self.block, self.calls, self.plans = share, block, calls, plans
        self.sites: dict[str, SiteStatistics] = {}

    def see(self, site: str, x: torch.Tensor, positions: range) -> None:
        """Take in a site's input x [B, T, K] for the calls at some positions."""
        if site not in self.plans:
            self.plans[site] = self._plan(site, x.shape[1])
        if site not in self.sites:
            where = f"{self.share.expert} block {self.block} {site}"
            self.sites[site] = SiteStatistics(x.shape[-1], self.plans[site], x.device.type, where)
        self.sites[site].add(x, [self.calls[i] for i in positions], positions)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        for site, found in self.sites.items():
            save_file(found.tensors(), folder / f"{site}.safetensors")

    def _plan(self, name: str, tokens: int) -> SitePlan:
        site, settings = next(s for s in WAN_SITES if s.name == name), self.share.capture
        samples = {"calibration": settings.search_tokens, "validation": settings.search_tokens, "heldout": settings.heldout_tokens}
        bins = self.share.bins if site.depends_on_timestep else None
        return plan_site(self.calls, bins, tokens, samples, settings.seed, stride=settings.moment_stride)


@lru_cache(maxsize=1)
def load_prologue(folder: Path, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """An expert's prologue, kept for the next share: at the real size, loading it takes as long as several calls."""
    return Denoiser(folder, device, dtype).prologue()


def hidden_states(positions: range) -> str:
    """The file of a chunk's outputs in its share."""
    return f"hidden_states.{positions.start:06d}.safetensors"


def add_up(shares: list[Unit], block: str, url: str | None, folder: Path) -> None:
    """A block's statistics, one Zarr group per site, from its shares; one share's sums of one site in memory at a time. url: where to
    put them, if not on disk."""
    for site in WAN_SITES:
        write_statistics(folder / site.name, (load_file(share.folder / block / f"{site.name}.safetensors") for share in shares))
    if url is not None:
        remote.move(folder, url)


def expert_bins(bins: Any, manifest: dict[str, Any], expert: str) -> Bins:
    """The expert's bins over its range of t."""
    if expert not in bins.model_extra:
        raise UserError(f"params: missing key 'bins.{expert}'")
    low, high = manifest["experts"][expert]["t_range"]
    return make_bins(bins.model_extra[expert], low, high, f"bins.{expert}")


if __name__ == "__main__":
    main(capture)
