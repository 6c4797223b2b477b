"""Replays the recorded calls of one expert through its blocks, and keeps the statistics of every site's input.

The work is cut both ways: into shards of `capture.calls_per_shard` calls, and into ranges of `capture.blocks_per_shard` blocks. A
shard takes its calls through one range, one block at a time. It holds what goes from block to block in memory, keeps the
last outputs for the next range, and keeps the sums of every block's statistics. Adding up the shards in their order gives a
block's statistics.

    <shard>/hidden_states.<first call>.safetensors   a chunk's outputs of the last block [B, T, D], if there is a block after it
    <shard>/<block>/<site>.safetensors               sums and samples (observer.py)
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stepquant.calibration.observer import SamplingPlan, SiteObserver, merge_shards, plan_sampling
from stepquant.calibration.statistics_files import block_name
from stepquant.calibration.trajectories import Call, Trajectories, spread_over_bins
from stepquant.models.bins import Bins
from stepquant.models.denoiser import BlockInputs, Denoiser, block_inputs
from stepquant.models.expert import open_expert
from stepquant.models.manifest import ModelManifest
from stepquant.models.sites import WAN_SITES, Site
from stepquant.params import Capture, Compute
from stepquant.storage import object_store


def replayed_calls(trajectories: Trajectories, expert: str, bins: Bins, settings: Capture) -> list[Call]:
    """The recorded calls of an expert that capture runs through its blocks."""
    return spread_over_bins(trajectories.calls(expert), bins, settings.steps_per_bin)


def cut_ranges(count: int, size: int) -> list[range]:
    """0 to count - 1 in ranges of `size`, the last one what is left."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True)
class Shard:
    """The work of one shard: some of an expert's calls through a range of blocks.

    trajectories: the artifact. previous: the folder of the same calls' shard of the block range before, None for the first.
    """

    expert: str
    manifest: ModelManifest
    trajectories: Path
    compute: Compute
    capture: Capture
    bins: Bins
    blocks: range
    calls: range
    previous: Path | None

    def __call__(self, folder: Path) -> None:
        """Replay, and write the shard's files into a folder. Raises UserError for NaN or Inf in an activation."""
        trajectories = Trajectories(self.trajectories)
        calls = replayed_calls(trajectories, self.expert, self.bins, self.capture)
        model = open_expert(self.manifest, self.expert, self.compute)
        chunks = [
            self.calls[chunk.start : chunk.stop] for chunk in cut_ranges(len(self.calls), self.capture.calls_per_chunk)
        ]
        inputs, hidden = self._first_inputs(model, trajectories, calls, chunks)

        def batches() -> Iterator[tuple[range, BlockInputs]]:
            for positions, found, states in zip(chunks, inputs, hidden):
                yield positions, found.with_hidden_states(states.to(found.timestep_proj.device))

        plans: dict[str, SamplingPlan] = {}  # the same in every block
        for index in self.blocks:
            observers = BlockObservers(self, index, calls, plans)
            for n, (_, output) in enumerate(replay_block(model.block(index), WAN_SITES, batches(), observers.observe)):
                hidden[n] = output.cpu()  # in place of this block's input: at the real size all of them are 16 GB
            observers.save(folder / block_name(index))
        if self.blocks.stop < self.manifest.expert(self.expert).blocks:
            for positions, states in zip(chunks, hidden):
                save_file({"hidden_states": states}, folder / hidden_states_file(positions))

    def _first_inputs(
        self, model: Denoiser, trajectories: Trajectories, calls: list[Call], chunks: list[range]
    ) -> tuple[list[BlockInputs], list[torch.Tensor]]:
        """Per chunk: what every block is given, and the hidden states that the shard's first block is given, on the CPU.

        Reading the calls and running the prologue takes a fifth of a block's forward, so it is done once for all blocks.
        """
        prologue = load_prologue(model.weights.folder.absolute(), model.device, model.dtype)
        inputs, hidden = [], []
        for positions in chunks:
            found = block_inputs(prologue, *trajectories.inputs([calls[i] for i in positions]))
            if self.previous is None:
                hidden.append(found.hidden_states.cpu())
            else:
                hidden.append(load_file(self.previous / hidden_states_file(positions))["hidden_states"])
            inputs.append(found.with_hidden_states(hidden[-1]))
        return inputs, hidden


class BlockObservers:
    """The statistics of one block's sites over one shard's calls."""

    def __init__(self, shard: Shard, block: int, calls: list[Call], plans: dict[str, SamplingPlan]):
        """plans: by site, of the blocks before; what is missing is added."""
        self.shard, self.block, self.calls, self.plans = shard, block, calls, plans
        self.sites: dict[str, SiteObserver] = {}

    def observe(self, site: str, x: torch.Tensor, positions: range) -> None:
        """Take in a site's input x [B, T, K] for the calls at some positions."""
        if site not in self.plans:
            self.plans[site] = self._plan(site, x.shape[1])
        if site not in self.sites:
            where = f"{self.shard.expert} block {self.block} {site}"
            self.sites[site] = SiteObserver(x.shape[-1], self.plans[site], x.device, where)
        self.sites[site].observe(x, [self.calls[i] for i in positions], positions)

    def save(self, folder: Path) -> None:
        folder.mkdir()
        for site, found in self.sites.items():
            save_file(found.tensors(), folder / f"{site}.safetensors")

    def _plan(self, name: str, tokens: int) -> SamplingPlan:
        site, settings = next(s for s in WAN_SITES if s.name == name), self.shard.capture
        samples = {
            "calibration": settings.search_tokens,
            "validation": settings.search_tokens,
            "heldout": settings.heldout_tokens,
        }
        bins = self.shard.bins if site.depends_on_timestep else None
        return plan_sampling(self.calls, bins, tokens, samples, settings.seed, stride=settings.hessian_stride)


@lru_cache(maxsize=1)
def load_prologue(folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    """An expert's prologue, kept for the next shard: at the real size, loading it takes as long as several calls."""
    return Denoiser(folder, device, dtype).prologue()


def hidden_states_file(positions: range) -> str:
    """The name of the file of a chunk's outputs in its shard."""
    return f"hidden_states.{positions.start:06d}.safetensors"


def add_up_shards(shards: list[Path], block: str, url: str | None, folder: Path) -> None:
    """Write a block's statistics, one Zarr group per site, from the folders of its shards, one shard's sums of one site in memory at a time.

    url: the object store to put them into, None for the disk.
    """
    for site in WAN_SITES:
        merge_shards(folder / site.name, (load_file(shard / block / f"{site.name}.safetensors") for shard in shards))
    if url is not None:
        object_store.move(folder, url)


@contextmanager
def site_inputs(
    block: nn.Module, sites: Iterable[Site], observe: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """While the block runs, observe(site, x) gets the input of each site the moment it is there.

    Nothing is kept: the inputs of all sites of one 81-frame call of Wan2.2-I2V-A14B would be 2.6 GB.
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
    """Run a block over batches of calls; yields each batch's output [B, T, D] for the next block.

    batches: positions of the calls and their inputs. observe(site, x [B, T, K], positions) gets every site's input, which it
    must not change.
    """
    positions = range(0)
    with site_inputs(block, sites, lambda site, x: observe(site, x, positions)):
        for positions, inputs in batches:
            yield (
                positions,
                block(inputs.hidden_states, inputs.encoder_hidden_states, inputs.timestep_proj, inputs.rotary_emb),
            )
