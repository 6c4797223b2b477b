"""capture@E: replay the recorded calls of one expert block by block, and keep statistics per site and bin.

Two kinds of unit: a block's statistics, which end up in the out, and a block's outputs, which the next block needs and
which are dropped once it is done. Outputs do not depend on bins or token counts.
"""

from collections.abc import Iterator
from functools import cached_property
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
from stepquant.calibration.statistics import SitePlan, SiteStatistics, plan_site
from stepquant.calibration.trajectories import Call, Trajectories
from stepquant.commands import command, main
from stepquant.compute.progress import track
from stepquant.compute.units import Unit, gather
from stepquant.errors import UserError
from stepquant.models.bins import Bins, make_bins
from stepquant.models.denoiser import BlockInputs, Denoiser, block_inputs
from stepquant.models.sites import WAN_SITES, Site
from stepquant.models.source import expert_digest

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
        replay = Replay(stage, manifest, expert)
        units = {block_name(i): replay.statistics(i) for i in track(range(manifest["experts"][expert]["blocks"]), f"capture@{expert}")}
        contents = {"bin_edges": replay.bins.edges, "blocks": {name: unit.digest for name, unit in units.items()}}
        texts = {"zarr.json": group_metadata({"expert": expert}), "manifest.json": to_json(contents)}
        gather(units, artifacts.activations(expert), texts)


class Replay:
    """The calls of one expert on their way through its blocks."""

    def __init__(self, stage: Stage, manifest: dict[str, Any], expert: str):
        self.stage = stage
        self.expert = expert
        self.manifest = manifest
        self.trajectories = Trajectories(artifacts.TRAJECTORIES)
        self.calls: list[Call] = self.trajectories.calls(expert)
        self.bins: Bins = expert_bins(stage["bins"], manifest, expert)
        self.inputs = {"model": expert_digest(manifest, expert), "trajectories": self.trajectories.digest()}

    def statistics(self, index: int) -> Unit:
        """The finished unit of one block's statistics; the block before it is run only if it has to be."""
        key = self.stage.key(("compute", "capture"), block=index, bins=self.bins.edges, **self.inputs)
        unit = self.stage.units.make(key, lambda folder: self._run(index, folder))
        last = index == self.manifest["experts"][self.expert]["blocks"] - 1
        for done in (index - 1, index) if last else (index - 1,):
            self.stage.units.drop(self._output_key(done))
        return unit

    def _run(self, index: int, folder: Path) -> None:
        """Run one block over all calls; the outputs become a unit of their own before the statistics do."""
        statistics: dict[str, SiteStatistics] = {}

        def see(site: str, x: torch.Tensor, positions: range) -> None:
            if site not in statistics:
                where = f"{self.expert} block {index} {site}"
                statistics[site] = SiteStatistics(x.shape[-1], self._plan(site, x.shape[1]), x.device.type, where)
            statistics[site].add(x, [self.calls[i] for i in positions], positions)

        self.stage.units.drop(self._output_key(index))
        self._output(index, see)
        for name, site in statistics.items():
            site.write(folder / name)

    def _output(self, index: int, see: Any = lambda *_: None) -> Unit:
        """The unit of a block's outputs [B, T, D], one file per batch of calls."""
        previous = None if index == 0 else self.stage.units.find(self._output_key(index - 1)) or self._output(index - 1)

        def work(folder: Path) -> None:
            batches = self._batches(previous)
            for positions, output in replay_block(self.model.block(index), WAN_SITES, batches, see):
                save_file({"hidden_states": output.cpu()}, folder / f"{positions.start:06d}.safetensors")

        return self.stage.units.make(self._output_key(index), work)

    def _output_key(self, index: int) -> str:
        return self.stage.key(("compute",), output_of=index, calls_per_chunk=self.stage["capture"].calls_per_chunk, **self.inputs)

    def _batches(self, previous: Unit | None) -> Iterator[tuple[range, BlockInputs]]:
        """Inputs of the next block: what stands before the blocks is cheap and run again, hidden states come from disk."""
        size = self.stage["capture"].calls_per_chunk
        for start in range(0, len(self.calls), size):
            positions = range(start, min(start + size, len(self.calls)))
            inputs = block_inputs(self.prologue, *self.trajectories.inputs([self.calls[i] for i in positions]))
            if previous is not None:
                stored = load_file(previous.folder / f"{start:06d}.safetensors")["hidden_states"]
                inputs = inputs.with_hidden_states(stored.to(inputs.hidden_states.device))
            yield positions, inputs

    def _plan(self, name: str, tokens: int) -> SitePlan:
        site: Site = next(s for s in WAN_SITES if s.name == name)
        settings = self.stage["capture"]
        samples = {"calibration": settings.search_tokens, "heldout": settings.heldout_tokens}
        return plan_site(self.calls, self.bins if site.depends_on_timestep else None, tokens, samples, settings.seed)

    @cached_property
    def model(self) -> Denoiser:
        return open_expert(self.manifest, self.expert, self.stage["compute"])

    @cached_property
    def prologue(self) -> torch.nn.Module:
        return self.model.prologue()


def expert_bins(bins: Any, manifest: dict[str, Any], expert: str) -> Bins:
    """The expert's bins over its range of t."""
    if expert not in bins.model_extra:
        raise UserError(f"params: missing key 'bins.{expert}'")
    low, high = manifest["experts"][expert]["t_range"]
    return make_bins(bins.model_extra[expert], low, high, f"bins.{expert}")


if __name__ == "__main__":
    main(capture)
