"""Replays recorded calls through one block and keeps its sites' statistics."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stepquant.models.denoiser import BlockInputs
from stepquant.models.sites import Site


@contextmanager
def site_inputs(block: nn.Module, sites: Iterable[Site], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """While the block runs, see(site, x) gets the input of each site the moment it is there.

    Nothing is kept: the inputs of all sites of one 81-frame call of Wan2.2-I2V-A14B would be 2.6 GB.
    """

    def hook(name: str):
        def show(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            see(name, args[0])

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
    see: Callable[[str, torch.Tensor, range], None],
) -> Iterator[tuple[range, torch.Tensor]]:
    """Run a block over batches of calls; yields each batch's output [B, T, D] for the next block.

    batches: positions of the calls and their inputs. see(site, x [B, T, K], positions) gets every site's input, which it must
    not change.
    """
    with site_inputs(block, sites, lambda site, x: see(site, x, positions)):
        for positions, inputs in batches:
            yield positions, block(inputs.hidden_states, inputs.encoder_hidden_states, inputs.timestep_proj, inputs.rotary_emb)
