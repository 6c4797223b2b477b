"""The current timestep bin: read from the denoiser's own `timestep` argument, once per call."""

import inspect
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from stepquant.errors import UserError
from stepquant.runtime.linear import W4A4Linear


def bin_index(timestep: Tensor, edges: Sequence[float]) -> Tensor:
    """Bin of a timestep tensor, as stepquant.models.bins.Bins.index counts it; int64 [1] on timestep's device.

    timestep [B], integer or float, all equal; or [B, tokens] where only conditioning tokens have t = 0, which is why
    the largest value counts. A t beyond the outer edges goes to the first or last bin, because raising would need the
    value on the host and so stall the device at every call.
    """
    t = timestep.max().double()  # double, as the edges are, so that a t on an edge falls on the same side as in Bins
    index = torch.zeros(1, dtype=torch.int64, device=timestep.device)
    for edge in edges[1:-1]:
        index += t <= edge
    return index


def set_bin(denoiser: nn.Module, index: Tensor) -> None:
    """Makes index (int64 [1]) the current bin of every quantized linear in denoiser."""
    for module in denoiser.modules():
        if isinstance(module, W4A4Linear):
            module.bin.copy_(index)


def follow_timestep(denoiser: nn.Module, edges: Sequence[float]) -> None:
    """Makes denoiser set the bin of its quantized linears at every call, from the `timestep` it is called with.

    edges: falling values of t. The hook keeps no state besides the edges, so copying or moving the denoiser is safe.
    Raises UserError if the denoiser's forward takes no `timestep`.
    """
    names = list(inspect.signature(denoiser.forward).parameters)
    if "timestep" not in names:
        raise UserError(f"{type(denoiser).__name__}.forward takes no `timestep`; clips per timestep bin need one")
    hook = partial(_set_bin_from_call, position=names.index("timestep"), edges=tuple(edges))
    denoiser.register_forward_pre_hook(hook, with_kwargs=True)


def _set_bin_from_call(
    denoiser: nn.Module, args: tuple, kwargs: dict, *, position: int, edges: tuple[float, ...]
) -> None:
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[position]
    set_bin(denoiser, bin_index(timestep, edges))
