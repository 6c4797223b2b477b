"""Compares a replay with what the pipeline computed, block by block. Calibration is trusted only if they agree.

Replay and pipeline differ by rounding alone: kernels sum in another order when calls are batched, and the output of a
block is rounded to the dtype of the arithmetic. A larger departure means that the model gets something that is neither
recorded nor replayed, and that all statistics from this block on would be those of another model.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.calibration.recorder import Samples, block_sample, output_sample
from stepquant.calibration.trajectories import Call, Trajectories
from stepquant.errors import UserError


def tolerance(dtype: torch.dtype, blocks: int) -> float:
    """The largest departure that rounding explains.

    Roundings of the residual stream, two roundings of eps / 2 in each of pipeline and replay, and of float32 sums over
    some thousand terms are independent from block to block, so the departure grows with the root of the depth.
    benchmarks/replay_departure.py measures a tenth of this or less.

    Args:
        dtype: of the arithmetic.
        blocks: number of blocks that the values went through.

    Returns:
        ||replayed - recorded|| / ||recorded||.
    """
    step = 2 * torch.finfo(dtype).eps + 1024 * torch.finfo(torch.float32).eps
    return step * math.sqrt(blocks)


def departure(replayed: Tensor, recorded: Tensor) -> Tensor:
    """||replayed - recorded|| / ||recorded||, a float32 scalar on the device of `replayed`."""
    reference = recorded.to(replayed.device).float()
    found: Tensor = (replayed.float() - reference).norm() / reference.norm()
    return found


class ReplayCheck:
    """Compares the replay of some calls of an expert with their samples.

    Args:
        expert: name of the expert.
        blocks: number of its blocks.
        dtype: of the arithmetic.
        trajectories: the recorded calls.
        calls: the calls.
    """

    def __init__(self, expert: str, blocks: int, dtype: torch.dtype, trajectories: Trajectories, calls: Sequence[Call]):
        self.expert, self.blocks, self.dtype = expert, blocks, dtype
        self.numbers = {call: trajectories.number(call) for call in calls}
        samples = {call: trajectories.samples(call, blocks) for call in calls}
        self.samples: dict[Call, Samples] = {call: found for call, found in samples.items() if found is not None}
        self._departures: list[tuple[Call, Tensor]] = []

    def add_block(self, block: int, calls: Sequence[Call], outputs: Tensor) -> None:
        """Compare a block's outputs [B, T, D] of B calls; the result stays on the device until `refuse`."""
        for call, output in zip(calls, outputs):
            if call in self.samples:
                found = block_sample(output, self.numbers[call], block)
                self._add(call, found, self.samples[call].blocks[block], f"block {block}")

    def add_output(self, calls: Sequence[Call], outputs: Tensor) -> None:
        """Compare the denoiser's outputs [B, ...] of B calls."""
        for call, output in zip(calls, outputs):
            if call in self.samples:
                found = output_sample(output, self.numbers[call])
                self._add(call, found, self.samples[call].output, "the layers after the last block")

    def _add(self, call: Call, replayed: Tensor, recorded: Tensor, where: str) -> None:
        if replayed.shape != recorded.shape:
            raise UserError(
                f"{self.expert}, {where}: {replayed.numel()} values replayed and {recorded.numel()} recorded (prompt "
                f"{call.prompt}); run stage trajectories again"
            )
        self._departures.append((call, departure(replayed, recorded)))

    def largest(self) -> tuple[float, Call] | None:
        """The largest departure of all that was added since the last time, and its call; None if there is none."""
        if not self._departures:
            return None
        values = torch.stack([value for _, value in self._departures]).nan_to_num(math.inf).tolist()
        index = max(range(len(values)), key=values.__getitem__)
        call = self._departures[index][0]
        self._departures.clear()
        return values[index], call

    def refuse_block(self, block: int) -> None:
        """Raises UserError if the block's outputs departed by more than rounding."""
        self._refuse(f"block {block}", block + 1)

    def refuse_output(self) -> None:
        """Raises UserError if the denoiser's outputs departed by more than rounding."""
        self._refuse("the layers after the last block", self.blocks + 1)

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
