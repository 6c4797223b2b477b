"""Which tokens of which calls contribute to a site's statistics.

The plan is made before any block runs and depends on its arguments only, so it is the same however the work is
distributed.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from stepquant.calibration.trajectories import Call
from stepquant.errors import UserError
from stepquant.models.bins import Bins


@dataclass(frozen=True)
class CallPlan:
    """The tokens of one call that contribute.

    Attributes:
        bin: the call's bin.
        skip: whether the call repeats the tokens of an earlier call (text tokens are the same at every step).
        rows: indices of the sampled tokens, sorted, int64.
        offset: first token of the sums; further ones follow at the plan's stride.
        weight: weight of each summed token in the Hessian.
    """

    bin: int
    skip: bool
    rows: np.ndarray
    offset: int
    weight: float


@dataclass(frozen=True)
class SamplingPlan:
    """The tokens of all calls that contribute to a site's statistics.

    Attributes:
        bins: number of bins.
        calls: one plan per call, in the order of the calls.
        stride: the sums take every `stride`-th token of a call.
    """

    bins: int
    calls: list[CallPlan]
    stride: int

    def summed(self, call: int) -> slice:
        """The tokens of a call that enter the sums."""
        return slice(self.calls[call].offset, None, self.stride)


def plan_sampling(
    calls: list[Call], bins: Bins | None, tokens: int, samples: dict[str, int], seed: int, *, stride: int
) -> SamplingPlan:
    """Choose the tokens of a site.

    Args:
        calls: all calls of the expert, ordered by prompt.
        bins: the expert's bins; None for a site that does not depend on t, which has one bin and uses one call per
            prompt and branch.
        tokens: number of tokens T per call.
        samples: number of tokens to sample per bin, by split.
        seed: of the samples.
        stride: the sums take one of so many tokens; a site that does not depend on t has few tokens, and all are taken.

    Returns:
        The plan.

    Raises:
        UserError: a bin has no recorded call of some split.
    """
    stride = 1 if bins is None else min(stride, tokens)
    bin_of = [0 if bins is None else bins.index(call.t) for call in calls]
    skip = _repeated(calls) if bins is None else [False] * len(calls)
    offsets = _offsets(calls, stride)
    count = 1 if bins is None else bins.count
    rows = [np.empty(0, dtype=np.int64) for _ in calls]
    weight = [0.0] * len(calls)
    for b in range(count):
        for split, wanted in samples.items():
            members = [i for i, c in enumerate(calls) if bin_of[i] == b and c.split == split and not skip[i]]
            if not members:
                raise UserError(_empty_bin(bins, b, split))
            summed = sum(len(range(offsets[i], tokens, stride)) for i in members)
            for i, chosen in zip(members, _sample(len(members), tokens, wanted, f"{seed}/{split}/{b}")):
                rows[i] = chosen
                weight[i] = 1.0 / (count * summed)
    return SamplingPlan(count, [CallPlan(*each) for each in zip(bin_of, skip, rows, offsets, weight)], stride)


def _repeated(calls: list[Call]) -> list[bool]:
    """Whether a call has the prompt and branch of an earlier one."""
    known: set[tuple[str, int]] = set()
    repeated = []
    for call in calls:
        repeated.append((call.prompt, call.branch) in known)
        known.add((call.prompt, call.branch))
    return repeated


def _offsets(calls: list[Call], stride: int) -> list[int]:
    """The first summed token of each call: a Latin square of prompts and of calls within a prompt.

    An image row of patches is often a multiple of the stride, so an offset is a set of image columns. Every call of a
    prompt (a step and a guidance branch) thus takes another set in the next prompt of its split, and `stride` prompts
    take all.
    """
    prompts: dict[str, dict[str, int]] = {}
    made: dict[str, int] = {}
    offsets = []
    for call in calls:
        numbers = prompts.setdefault(call.split, {})
        prompt, number = numbers.setdefault(call.prompt, len(numbers)), made.get(call.prompt, 0)
        made[call.prompt] = number + 1
        offsets.append((prompt + number) % stride)
    return offsets


def _sample(calls: int, tokens: int, wanted: int, seed: str) -> list[np.ndarray]:
    """Token indices per call: `wanted` of all calls * tokens, without replacement, sorted."""
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))
    total = calls * tokens
    chosen = np.sort(generator.choice(total, size=min(wanted, total), replace=False))
    return [chosen[chosen // tokens == call] % tokens for call in range(calls)]


def _empty_bin(bins: Bins | None, b: int, split: str) -> str:
    if bins is None:
        return f"trajectories: no call of split '{split}'; the calibration manifest needs prompts of every split"
    return (
        f"bins: no recorded {split} step has t in bin {b}, ({bins.edges[b + 1]:g}, {bins.edges[b]:g}]; "
        "use fewer or wider bins, more sampling.steps, or more prompts"
    )
