"""Compares a replay with what the pipeline computed, block by block. Calibration is trusted only if they agree.

Replay and pipeline differ by rounding alone: kernels sum in another order when calls are batched, and the output of a
block is rounded to the dtype of the arithmetic. A larger departure means that the model gets something that is neither
recorded nor replayed, and that all statistics from this block on would be those of another model.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.calibration.recorder import Samples, block_places, output_places
from stepquant.calibration.trajectories import Call, Trajectories
from stepquant.errors import UserError
from stepquant.models.denoiser import Denoiser

AFTER = "the layers after the last block"
SAMPLED = ("blocks", "output")


def tolerance(dtype: torch.dtype, blocks: int) -> float:
    """The largest departure that rounding explains.

    Pipeline and replay round the residual stream to eps / 2 three times per block, and sum some thousand terms in
    float32. In the worst case their roundings are independent: then the relative departure of a block is half of eps,
    and it grows with the root of the depth. benchmarks/replay_departure.py measures that in bfloat16 (0.0043 in block
    0, 0.014 after 40 blocks, which are 0.27 and 0.14 of what is allowed) and less than 0.01 of it in float32.

    Args:
        dtype: of the arithmetic.
        blocks: number of blocks that the values went through.

    Returns:
        ||replayed - recorded|| / ||recorded||.
    """
    step = 2 * torch.finfo(dtype).eps + 1024 * torch.finfo(torch.float32).eps
    return step * math.sqrt(blocks)


def departures(replayed: Tensor, recorded: Tensor) -> Tensor:
    """||replayed - recorded|| / ||recorded|| of every call.

    Args:
        replayed: values [B, V] of B calls.
        recorded: the values that the pipeline computed, on the same device.

    Returns:
        float32 [B].
    """
    found: Tensor = (replayed.float() - recorded.float()).norm(dim=1) / recorded.float().norm(dim=1)
    return found


class ReplayCheck:
    """Compares the replay of some calls of an expert with their samples.

    Args:
        expert: name of the expert.
        blocks: number of its blocks.
        model: dtype and device of the arithmetic.
        trajectories: the recorded calls.
        batches: the calls of every batch of the replay.

    Raises:
        UserError: the calls were recorded with another number of blocks.
    """

    def __init__(
        self, expert: str, blocks: int, model: Denoiser, trajectories: Trajectories, batches: Sequence[list[Call]]
    ):
        self.expert, self.blocks, self.dtype = expert, blocks, model.dtype
        self._batches = [_Batch(calls, blocks, trajectories, model.device) for calls in batches]
        self._departures: list[tuple[list[Call], Tensor]] = []

    @property
    def compares(self) -> bool:
        """Whether there is something to compare with; not for made-up calls."""
        return all(batch.samples is not None for batch in self._batches)

    def add_block(self, block: int, n: int, outputs: Tensor) -> None:
        """Compare a block's outputs [B, T, D] of batch n; the result stays on the device until `refuse_block`."""
        if (samples := self._batches[n].samples) is not None:
            self._add(n, self._batches[n].block_values(outputs), samples.blocks[:, block], f"block {block}")

    def add_output(self, n: int, outputs: Tensor) -> None:
        """Compare the denoiser's outputs [B, ...] of batch n."""
        if (samples := self._batches[n].samples) is not None:
            self._add(n, self._batches[n].output_values(outputs), samples.output, AFTER)

    def _add(self, n: int, replayed: Tensor, recorded: Tensor, where: str) -> None:
        if replayed.shape != recorded.shape:
            raise UserError(
                f"{self.expert}, {where}: {replayed.shape[1]} values replayed and {recorded.shape[1]} recorded; run "
                "stage trajectories again"
            )
        self._departures.append((self._batches[n].calls, departures(replayed, recorded)))

    def largest(self) -> tuple[float, Call] | None:
        """The largest departure of all that was added since the last time, and its call; None if there is none."""
        if not self._departures:
            return None
        calls = [call for batch, _ in self._departures for call in batch]
        values = torch.cat([found for _, found in self._departures]).nan_to_num(math.inf).tolist()
        self._departures.clear()
        return max(zip(values, calls), key=lambda found: found[0])

    def refuse_block(self, block: int) -> None:
        """Raises UserError if the block's outputs departed by more than rounding."""
        self._refuse(f"block {block}", block + 1)

    def refuse_output(self) -> None:
        """Raises UserError if the denoiser's outputs departed by more than rounding."""
        self._refuse(AFTER, self.blocks + 1)

    def _refuse(self, where: str, depth: int) -> None:
        found, allowed = self.largest(), tolerance(self.dtype, depth)
        if found is None or found[0] <= allowed:
            return
        value, call = found
        raise UserError(
            f"{self.expert}: replay departs from the pipeline at {where} by {value:.2g} of its output (prompt "
            f"{call.prompt}, step {call.step + 1}, branch {call.branch + 1}, t = {call.t:g}); rounding to "
            f"{str(self.dtype).removeprefix('torch.')} explains {allowed:.2g}. The pipeline gives this model something "
            "that is not recorded and replayed, or changed it while sampling; it cannot be calibrated"
        )


class _Batch:
    """What the pipeline computed in the calls of one batch, on the device of the replay."""

    def __init__(self, calls: list[Call], blocks: int, trajectories: Trajectories, device: torch.device | str):
        self.calls, self.numbers = calls, [trajectories.number(call) for call in calls]
        found = [sample for call in calls if (sample := trajectories.samples(call, blocks)) is not None]
        self.samples: Samples | None = None
        if len(found) == len(calls):
            values = (torch.stack([getattr(sample, name) for sample in found]).to(device) for name in SAMPLED)
            self.samples = Samples(*values)
        self._places: Tensor | None = None

    def block_values(self, outputs: Tensor) -> Tensor:
        """The values of a block's outputs [B, T, D] that were recorded, [B, values]."""
        if self._places is None:  # the same for every block
            self._places = _rows([block_places(number, *outputs.shape[1:]) for number in self.numbers], outputs)
        return outputs.flatten(1).gather(1, self._places)

    def output_values(self, outputs: Tensor) -> Tensor:
        """The values of the denoiser's outputs [B, ...] that were recorded, [B, values]."""
        values = outputs.flatten(1)
        return values.gather(1, _rows([output_places(number, values.shape[1]) for number in self.numbers], outputs))


def _rows(places: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(places).to(like.device)
