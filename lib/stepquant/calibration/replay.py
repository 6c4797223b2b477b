"""Replays the recorded calls of one expert block by block and keeps the statistics of every site's input.

The work is divided into shards of `capture.calls_per_shard` calls and ranges of `capture.blocks_per_shard` blocks. A
unit of work runs the calls of one shard through one block range, a block at a time. It keeps hidden states in host
memory, stores the last block's outputs for the next range, and stores the sums of every block's statistics. Merging the
shards in their order gives a block's statistics. Every unit compares its outputs with what the pipeline computed
(replay_check.py), so the first one already refuses a model that cannot be replayed.

    <unit>/hidden_states.<first call>.safetensors   output [B, T, D] of the range's last block for a chunk of calls;
                                                    absent after the expert's last block
    <unit>/<block>/<site>.safetensors               sums and samples (observer.py)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stepquant.calibration.captions import caption_calls
from stepquant.calibration.hidden_states import HiddenStates, open_hidden_states
from stepquant.calibration.merge import merge_shards
from stepquant.calibration.observer import SiteObserver
from stepquant.calibration.replay_check import ReplayCheck
from stepquant.calibration.sampling_plan import SamplingPlan, plan_sampling
from stepquant.calibration.statistics_files import block_name
from stepquant.calibration.trajectories import Call, Trajectories, spread_over_bins
from stepquant.models.bins import Bins
from stepquant.models.block_inputs import BlockInputs, Glue, KeptInputs
from stepquant.models.expert import open_expert
from stepquant.models.manifest import ModelManifest
from stepquant.models.sites import Site
from stepquant.params import Capture, Compute
from stepquant.storage import object_store


def replayed_calls(trajectories: Trajectories, expert: str, bins: Bins, settings: Capture) -> list[Call]:
    """The recorded calls of an expert that capture runs through its blocks, ordered by prompt, step and branch."""
    return spread_over_bins(trajectories.calls(expert), bins, settings.steps_per_bin)


def cut_ranges(count: int, size: int) -> list[range]:
    """Divide 0 to count - 1 into ranges of `size`; the last one can be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True)
class ReplayWork:
    """What every unit of a replay is told.

    Attributes:
        expert: name of the expert.
        manifest: the source model.
        trajectories: the artifact with the recorded calls.
        compute: device and dtype.
        capture: how the work is divided, and how many tokens are kept.
        bins: the expert's bins.
        blocks: indices of the blocks.
    """

    expert: str
    manifest: ModelManifest
    trajectories: Path
    compute: Compute
    capture: Capture
    bins: Bins
    blocks: range


@dataclass(frozen=True)
class Shard(ReplayWork):
    """The work of one unit: some of an expert's calls through one range of blocks.

    Attributes:
        calls: indices of the calls.
        previous: folder of the unit with the same calls and the block range before; None for the first range.
    """

    calls: range
    previous: Path | None

    def __call__(self, folder: Path) -> None:
        """Replay the calls and write the unit's files.

        Args:
            folder: the unit's folder.

        Raises:
            UserError: NaN or Inf in an activation, a replay that departs from what the pipeline computed, or a missing
                or damaged input.
        """
        trajectories, described = Trajectories(self.trajectories), self.manifest.expert(self.expert)
        calls = replayed_calls(trajectories, self.expert, self.bins, self.capture)
        model = open_expert(self.manifest, self.expert, self.compute)
        chunks = [
            self.calls[chunk.start : chunk.stop] for chunk in cut_ranges(len(self.calls), self.capture.calls_per_chunk)
        ]
        batches = [[calls[i] for i in positions] for positions in chunks]
        check = ReplayCheck(self.expert, described.blocks, model, trajectories, batches)
        inputs, first = self._first_inputs(trajectories, calls, chunks)
        captions = caption_calls(trajectories)
        plans: dict[str, SamplingPlan] = {}  # the same in every block
        with open_hidden_states(first, self.compute.device) as hidden:
            for index in self.blocks:
                observers = BlockObservers(self, index, calls, captions, plans)
                given = _batches(chunks, inputs, hidden)
                replayed = replay_block(model.block(index), described.ordered_sites, given, observers.observe)
                for n, (_, output) in enumerate(replayed):
                    check.add_block(index, n, output)
                    hidden.put(n, output)
                observers.save(folder / block_name(index))
                check.refuse_block(index)
            if self.blocks.stop < described.blocks:
                for n, positions in enumerate(chunks):
                    save_file({"hidden_states": hidden.host(n)}, folder / hidden_states_file(positions))
            elif check.compares:
                for n, batch in enumerate(batches):
                    check.add_output(n, self._glue().output(trajectories.inputs(batch), hidden.get(n)))
                check.refuse_output()

    def _glue(self) -> Glue:
        return load_glue(self.manifest.model_dump_json(), self.expert, self.compute)

    def _first_inputs(
        self, trajectories: Trajectories, calls: list[Call], chunks: list[range]
    ) -> tuple[list[KeptInputs], list[torch.Tensor]]:
        """Per chunk: the inputs that all blocks share, and the hidden states of the shard's first block on the host.

        Reading the calls and running the layers before the blocks takes a fifth of a block's forward, so it is done
        once for all blocks. What is kept on the device is 5.4 MB per call and 34 MB of rotary embeddings at the size of
        Wan2.2-I2V-A14B.
        """
        inputs: list[KeptInputs] = []
        hidden = []
        for positions in chunks:
            found = self._glue().inputs(trajectories.inputs([calls[i] for i in positions]))
            if self.previous is None:
                hidden.append(found.hidden_states.cpu())
            else:
                hidden.append(load_file(self.previous / hidden_states_file(positions))["hidden_states"])
            inputs.append(KeptInputs.of(found, inputs[0] if inputs else None))
        return inputs, hidden


def _batches(
    chunks: list[range], inputs: list[KeptInputs], hidden: HiddenStates
) -> Iterator[tuple[range, BlockInputs]]:
    """The calls of every chunk with a block's inputs."""
    for n, (positions, found) in enumerate(zip(chunks, inputs)):
        yield positions, found.with_hidden_states(hidden.get(n))


class BlockObservers:
    """The statistics of one block's sites over the calls of one unit of work.

    Args:
        work: the unit of work.
        block: index of the block.
        calls: all replayed calls of the expert.
        captions: the calls of all captions, which follow in the plans of the sites that read text alone.
        plans: sampling plans by site, shared by all blocks; missing ones are added.
    """

    def __init__(
        self, work: ReplayWork, block: int, calls: list[Call], captions: list[Call], plans: dict[str, SamplingPlan]
    ):
        self.work, self.block, self.plans = work, block, plans
        self.recorded, self.calls = len(calls), calls + captions
        self.sites: dict[str, SiteObserver] = {}

    def observe(self, site: str, x: torch.Tensor, positions: range) -> None:
        """Add a site's input x [B, T, K] of the calls at some positions."""
        if site not in self.plans:
            self.plans[site] = self._plan(site, x.shape[1])
        if site not in self.sites:
            where = f"{self.work.expert} block {self.block} {site}"
            self.sites[site] = SiteObserver(x.shape[-1], self.plans[site], x.device, where)
        self.sites[site].observe(x, [self.calls[i] for i in positions], positions)

    def save(self, folder: Path) -> None:
        """Write one file per site. Raises UserError if an input had NaN or Inf."""
        folder.mkdir()
        for site, observer in self.sites.items():
            save_file(observer.tensors(), folder / f"{site}.safetensors")

    def _plan(self, name: str, tokens: int) -> SamplingPlan:
        site, settings = self.work.manifest.expert(self.work.expert).sites[name], self.work.capture
        samples = {
            "calibration": settings.search_tokens,
            "validation": settings.search_tokens,
            "heldout": settings.heldout_tokens,
        }
        bins = self.work.bins if site.depends_on_timestep else None
        calls = self.calls if site.text_alone else self.calls[: self.recorded]
        return plan_sampling(calls, bins, tokens, samples, settings.seed, stride=settings.hessian_stride)


@lru_cache(maxsize=1)
def load_glue(manifest: str, expert: str, compute: Compute) -> Glue:
    """The layers around an expert's blocks, cached for the next shard, because loading them takes as long as several
    calls.

    Args:
        manifest: of the source model, as JSON. It has the digests of all weights and LoRAs, so the cache holds no
            others.
        expert: name of the expert.
        compute: device and dtype.
    """
    return open_expert(ModelManifest.model_validate_json(manifest), expert, compute).glue()


def hidden_states_file(positions: range) -> str:
    """File name of the outputs of a chunk of calls in the unit's folder."""
    return f"hidden_states.{positions.start:06d}.safetensors"


def add_up_shards(shards: Mapping[str, Sequence[Path]], block: str, url: str | None, folder: Path) -> None:
    """Merge the shards of one block and write its statistics, one Zarr group per site.

    One site's sums of one shard are in memory at a time, beside the merged ones.

    Args:
        shards: folders of the units that observed a site, in the order of the calls, by name of the site.
        block: folder name of the block.
        url: the object store into which the groups are moved; None leaves them on disk.
        folder: where the groups are written.

    Raises:
        UserError: the object store refuses.
    """
    for site, units in shards.items():
        merge_shards(folder / site, (load_file(unit / block / f"{site}.safetensors") for unit in units))
    if url is not None:
        object_store.move(folder, url)


@contextmanager
def site_inputs(
    block: nn.Module, sites: Iterable[Site], observe: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Observe the input of each site while a block runs.

    Inputs are not kept: those of all sites for one 81-frame call of Wan2.2-I2V-A14B would be 2.6 GB.

    Args:
        block: the block's module.
        sites: the sites to observe.
        observe: called with a site's name and input [B, T, K], before the site's first linear runs.

    Yields:
        Nothing; the hooks are removed at the end of the `with` block.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def show(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            observe(name, args[0])

        return show

    handles = [block.get_submodule(site.linears[0]).register_forward_pre_hook(hook(site.name)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def replay_block(
    block: nn.Module,
    sites: tuple[Site, ...],
    batches: Iterable[tuple[range, BlockInputs]],
    observe: Callable[[str, torch.Tensor, range], None],
) -> Iterator[tuple[range, torch.Tensor]]:
    """Run a block over batches of calls.

    Args:
        block: the block's module.
        sites: the sites to observe.
        batches: positions of the calls, and the block's inputs for them.
        observe: called with a site's name, its input [B, T, K] and the positions of the calls; must not change the
            input.

    Yields:
        The positions of each batch and the block's output [B, T, D], which is the next block's hidden states.
    """
    positions = range(0)
    with site_inputs(block, sites, lambda site, x: observe(site, x, positions)):
        for positions, inputs in batches:
            yield positions, inputs.run(block)
