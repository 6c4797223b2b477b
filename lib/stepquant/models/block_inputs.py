"""The arguments of a denoiser's blocks, caught by name from the denoiser's own forward.

The denoiser without its blocks (`Denoiser.glue`) does everything that the model does before and after them. In place of
the blocks stands one module that either ends the forward with its arguments, or returns given hidden states.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockInputs:
    """The arguments of a block for B calls.

    Attributes:
        hidden_states: [B, T, D], the argument that the output of a block replaces.
        carried: name of that argument.
        others: the other arguments by name, the same for every block: tensors, tuples of tensors, or plain values.
    """

    hidden_states: Tensor
    carried: str
    others: Mapping[str, Any]

    def run(self, block: nn.Module) -> Tensor:
        """The output [B, T, D] of a block, which is the next block's hidden states."""
        output: Tensor = block(**{self.carried: self.hidden_states}, **self.others)
        return output


@dataclass(frozen=True)
class KeptInputs:
    """Block inputs without hidden states, kept small while the hidden states change from block to block.

    Modulation with t per token is [B, T, 6, D] float32, 2 GB for a call of Wan2.2-TI2V-5B. Its rows are equal for all
    tokens with equal t, so runs of equal rows are kept once.

    Attributes:
        carried: as in BlockInputs.
        others: as in BlockInputs, with tensors as `_Runs` where that is smaller.
    """

    carried: str
    others: Mapping[str, Any]

    @classmethod
    def of(cls, inputs: BlockInputs, earlier: "KeptInputs | None") -> "KeptInputs":
        """What to keep of some calls' inputs.

        Args:
            inputs: of B calls.
            earlier: kept inputs of other calls, if there are any; what is equal is shared (rotary embeddings).
        """
        kept = {name: _compressed(value) for name, value in inputs.others.items()}
        if earlier is not None:
            kept |= {name: found for name, found in earlier.others.items() if _equal(kept.get(name), found)}
        return cls(inputs.carried, kept)

    def with_hidden_states(self, hidden_states: Tensor) -> BlockInputs:
        """The inputs of a block for the same calls."""
        return BlockInputs(hidden_states, self.carried, {name: _expanded(value) for name, value in self.others.items()})


@dataclass(frozen=True)
class _Runs:
    """A tensor [B, length, ...] whose rows repeat: each row of `rows` [B, R, ...] as often as `counts` [R] says."""

    rows: Tensor
    counts: Tensor
    length: int


def _compressed(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_compressed, value))
    if not isinstance(value, Tensor) or value.ndim < 3 or value.shape[1] < 2:
        return value
    changes = torch.ones(value.shape[1], dtype=torch.bool, device=value.device)
    changes[1:] = (value[:, 1:] != value[:, :-1]).flatten(2).any(2).any(0)
    starts = changes.nonzero().squeeze(1)
    if 2 * len(starts) > value.shape[1]:
        return value
    counts = torch.diff(starts, append=torch.full_like(starts[:1], value.shape[1]))
    return _Runs(value[:, starts], counts, value.shape[1])


def _expanded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if not isinstance(value, _Runs):
        return value
    # With its length given, a GPU does not have to wait for the counts.
    return value.rows.repeat_interleave(value.counts, 1, output_size=value.length)


def _equal(a: Any, b: Any) -> bool:
    """Whether two kept values are the same, without broadcasting."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, _Runs):
        return _equal(a.rows, b.rows) and _equal(a.counts, b.counts)
    return bool(a == b)


class _Caught(Exception):
    """Carries the first block's arguments, by name, out of the denoiser's forward."""


class BlocksStandIn(nn.Module):
    """Stands in the place of all blocks.

    Args:
        block: class of the blocks, whose forward names the arguments.
    """

    def __init__(self, block: type[nn.Module]):
        super().__init__()
        self._signature = inspect.signature(block.forward)
        self.output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states behind the blocks, if they have been given; else ends the forward."""
        if self.output is not None:
            return self.output
        raise _Caught(self._signature.bind(self, *args, **kwargs).arguments)


@dataclass(frozen=True)
class Glue:
    """What a denoiser does before its first and after its last block. Its parameters take no gradients.

    Attributes:
        model: the denoiser, with a stand-in in the place of its blocks.
        blocks: the stand-in.
        carried: name of the blocks' argument that their output replaces.
        timestep: argument of the denoiser with t, which keeps its dtype.
        dtype: of the other floating-point arguments.
        device: of the work.
    """

    model: nn.Module
    blocks: BlocksStandIn
    carried: str
    timestep: str
    dtype: torch.dtype
    device: torch.device | str

    def inputs(self, arguments: Mapping[str, Tensor]) -> BlockInputs:
        """The first block's arguments for B recorded calls.

        Args:
            arguments: of the denoiser's forward by name.
        """
        try:
            self.model(**self._prepared(arguments))
        except _Caught as caught:
            (found,) = caught.args
            others = {name: value for name, value in found.items() if name not in ("self", self.carried)}
            return BlockInputs(found[self.carried], self.carried, others)
        raise AssertionError("the denoiser's forward never reached its blocks")

    def output(self, arguments: Mapping[str, Tensor], hidden_states: Tensor) -> Tensor:
        """The denoiser's output for B recorded calls.

        Args:
            arguments: of the denoiser's forward by name.
            hidden_states: [B, T, D], the last block's output.
        """
        self.blocks.output = hidden_states
        try:
            found: Tensor = self.model(**self._prepared(arguments), return_dict=False)[0]
        finally:
            self.blocks.output = None
        return found

    def _prepared(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments on the device; floating-point ones but t in the dtype of the arithmetic."""
        return {
            name: value.to(
                self.device, self.dtype if value.is_floating_point() and name != self.timestep else value.dtype
            )
            for name, value in arguments.items()
        }
