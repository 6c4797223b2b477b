"""Sets the timestep bin of a denoiser from its `timestep` argument, once per call."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import InvalidInput
from stepquant.runtime.linear import W4A4Linear
from stepquant.runtime.timestep_bin import TimestepBin


def bin_index(timestep: Tensor, edges: Sequence[float]) -> Tensor:
    """Bin of every sample of a call, equal to `stepquant.models.bins.Bins.index`.

    Args:
        timestep: integer or float, [] or [B], or [B, tokens] where conditioning tokens have t = 0: the largest value of
            a sample is its t.
        edges: falling values of t. A t beyond the outer edges belongs to the first or the last bin: an error would
            need the value on the host, which would stall a GPU at every call.

    Returns:
        int64 [B] on the device of `timestep`; [1] for a timestep without dimensions.
    """
    samples = len(timestep) if timestep.dim() else 1
    t = timestep.reshape(samples, -1).amax(1).double()  # double, as the edges are: a t on an edge gets the same bin
    index = torch.zeros(samples, dtype=torch.int64, device=timestep.device)
    for edge in edges[1:-1]:
        index += t <= edge
    return index


def follow_timestep(denoiser: nn.Module, edges: Sequence[float]) -> None:
    """Make a denoiser set the bin of its quantized linears at every call, from the `timestep` of the call.

    All quantized linears get the same `TimestepBin`, which a forward pre-hook writes once per call. A deep copy of the
    denoiser has a bin of its own.

    Args:
        denoiser: a module whose forward has a parameter `timestep`.
        edges: falling values of t, as in `bin_index`.

    Raises:
        InvalidInput: if the denoiser's forward has no parameter `timestep`.
    """
    names = list(inspect.signature(denoiser.forward).parameters)
    if "timestep" not in names:
        raise InvalidInput(
            f"{type(denoiser).__name__}.forward has no parameter `timestep`; clips per timestep bin need one"
        )
    timestep_bin = TimestepBin()
    for module in denoiser.modules():
        if isinstance(module, W4A4Linear):
            module.bin = timestep_bin
    hook = partial(_set_bin_from_call, timestep_bin=timestep_bin, position=names.index("timestep"), edges=tuple(edges))
    denoiser.register_forward_pre_hook(hook, with_kwargs=True)


def _set_bin_from_call(
    denoiser: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    timestep_bin: TimestepBin,
    position: int,
    edges: tuple[float, ...],
) -> None:
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[position]
    timestep_bin.set(bin_index(timestep, edges))
