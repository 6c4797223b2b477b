"""Replays recorded calls through one block and keeps its sites' statistics."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stepquant.models.denoiser import BlockInputs
from stepquant.models.sites import Site


@contextmanager
def site_inputs(block: nn.Module, sites: Iterable[Site]) -> Iterator[dict[str, torch.Tensor]]:
    """While the block runs, the input of each site appears in the dict under its name (the last call's)."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = args[0]

        return keep

    handles = [block.get_submodule(site.linears[0]).register_forward_pre_hook(hook(site.name)) for site in sites]
    try:
        yield seen
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

    batches: positions of the calls and their inputs. see(site, x [B, T, K], positions) gets every site's input.
    """
    with site_inputs(block, sites) as seen:
        for positions, inputs in batches:
            output = block(inputs.hidden_states, inputs.encoder_hidden_states, inputs.timestep_proj, inputs.rotary_emb)
            for site in sites:
                see(site.name, seen.pop(site.name), positions)
            yield positions, output
