"""Records every call of a denoiser while a pipeline samples: its tensor arguments, and samples of what it computed.

The samples are what a replay is compared with (replay_check.py): some values of every block's output and of the
denoiser's output. They are 90 kB for a call of Wan2.2-I2V-A14B.
"""

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepquant.errors import UserError
from stepquant.models.families import find_denoiser

TOKENS, CHANNELS = 16, 64  # of a block's output
VALUES = 4096  # of the denoiser's output

# Arguments that are not tensors and change nothing that is computed.
PLAIN = {"return_dict": (True, False), "attention_kwargs": (None, {})}


@dataclass(frozen=True)
class Samples:
    """Some values that one call computed.

    Attributes:
        blocks: of every block's output, [blocks, tokens x channels], in its dtype.
        output: of the denoiser's output, [values], in its dtype.
    """

    blocks: Tensor
    output: Tensor


@dataclass(frozen=True)
class RecordedCall:
    """One call of a denoiser.

    Attributes:
        expert: name of the expert.
        arguments: copies of its tensor arguments, on the CPU, by the name that forward gives them.
        samples: what it computed; None for made-up calls, whose replay cannot be compared with anything.
    """

    expert: str
    arguments: Mapping[str, Tensor]
    samples: Samples | None


def block_places(call: int, tokens: int, channels: int) -> Tensor:
    """Which values of a block's output are compared, the same in every block of a call and others in every call.

    Args:
        call: number of the call in its prompt, over all experts.
        tokens: of the output [T, D].
        channels: of the output.

    Returns:
        Seeded positions in the flattened output, int64 [tokens x channels].
    """
    generator = _generator(f"block/{call}")
    rows, columns = _choose(generator, tokens, TOKENS), _choose(generator, channels, CHANNELS)
    return (rows[:, None] * channels + columns).flatten()


def output_places(call: int, size: int) -> Tensor:
    """Which values of a denoiser's output are compared.

    Args:
        call: number of the call in its prompt, over all experts.
        size: number of values in the output.

    Returns:
        Seeded positions in the flattened output, int64 [values].
    """
    return _choose(_generator(f"output/{call}"), size, VALUES)


def _generator(seed: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))


def _choose(generator: np.random.Generator, size: int, count: int) -> Tensor:
    return torch.from_numpy(generator.choice(size, size=min(size, count), replace=False))


@contextmanager
def recorded(experts: Mapping[str, nn.Module]) -> Iterator[list[RecordedCall]]:
    """Record every call of some experts.

    Args:
        experts: modules by expert name, each of a denoiser class that is known (models/families).

    Yields:
        A list that grows by one entry per call made inside the `with` block.

    Raises:
        UserError: inside the `with` block, if a call has an argument that cannot be recorded.
    """
    calls: list[RecordedCall] = []
    recorders = []
    try:
        for name, module in experts.items():
            recorders.append(_Recorder(name, module, calls))
        yield calls
    finally:
        for recorder in recorders:
            recorder.remove()


class _Recorder:
    """The hooks on one expert and on its blocks.

    Args:
        expert: name of the expert.
        module: the denoiser.
        calls: where its calls are appended.
    """

    def __init__(self, expert: str, module: nn.Module, calls: list[RecordedCall]):
        self.expert, self.calls = expert, calls
        self._signature = inspect.signature(type(module).forward)
        self._arguments: dict[str, Tensor] = {}
        self._blocks: list[Tensor] = []
        self._places = torch.empty(0)
        blocks = getattr(module, find_denoiser(type(module).__name__).stack.attribute)
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
            *(block.register_forward_hook(self._after_block) for block in blocks),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind(module, *args, **kwargs).arguments
        found = {name: value for name, value in given.items() if value is not module and value is not None}
        self._arguments = {}
        for name, value in found.items():
            if isinstance(value, Tensor):
                self._arguments[name] = value.detach().cpu().clone()
            elif name not in PLAIN or value not in PLAIN[name]:
                raise UserError(
                    f"{self.expert}: the pipeline passes its denoiser {name} = {_shown(value)}, which cannot be "
                    "recorded; allowed: tensors"
                )
        self._blocks = []

    def _after_block(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        first = output.detach()[0]
        if not self._blocks:  # sent to the device once per call
            self._places = block_places(len(self.calls), *first.shape).to(first.device)
        self._blocks.append(first.flatten()[self._places])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        values = output[0].detach()[0].flatten()
        places = output_places(len(self.calls), len(values)).to(values.device)
        samples = Samples(torch.stack(self._blocks).cpu(), values[places].cpu())
        self.calls.append(RecordedCall(self.expert, self._arguments, samples))


def _shown(value: Any) -> str:
    return f"{type(value).__name__} of {', '.join(map(str, value))}" if isinstance(value, dict) else repr(value)[:80]
