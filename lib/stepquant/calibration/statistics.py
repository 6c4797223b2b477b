"""Accumulates the statistics of a site's input, per timestep bin; calibration/activations.py says what is kept.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stepquant.calibration.activations import SAMPLES, write_activations
from stepquant.calibration.trajectories import Call
from stepquant.errors import UserError
from stepquant.models.bins import Bins

SPLITS = dict(zip(("calibration", "heldout"), SAMPLES))
SLAB = 2048  # rows of a call at a time: float32 copies of 13,824 channels are then 113 MB each
PANEL = 1024  # columns: the second moments of 5,120 channels then cost 60 % of the full product, of 13,824 54 %


@dataclass(frozen=True)
class SitePlan:
    """Which tokens of which calls a site's statistics take.

    bin and rows are per call, in the order of the calls; rows are the sampled token indices inside the call. skip marks
    calls that repeat what another call showed already (text tokens are the same at every step).
    """

    bins: int
    bin: list[int]
    skip: list[bool]
    rows: list[np.ndarray]
    weight: list[float]


def plan_site(calls: list[Call], bins: Bins | None, tokens: int, samples: dict[str, int], seed: int) -> SitePlan:
    """Choose a site's tokens before any block runs, so that the choice depends on nothing but its arguments.

    bins: None for a site that does not depend on t (one bin, one call per prompt and branch). tokens: per call.
    samples: tokens to keep per bin, by split. Raises UserError if a bin has no recorded call of some split.
    """
    seen: set[tuple[str, int]] = set()
    bin_of, skip = [], []
    for call in calls:
        bin_of.append(0 if bins is None else bins.index(call.t))
        skip.append(bins is None and (call.prompt, call.branch) in seen)
        seen.add((call.prompt, call.branch))
    count = 1 if bins is None else bins.count
    rows = [np.empty(0, dtype=np.int64) for _ in calls]
    weight = [0.0] * len(calls)
    for b in range(count):
        for split, wanted in samples.items():
            members = [i for i, c in enumerate(calls) if bin_of[i] == b and c.split == split and not skip[i]]
            if not members:
                raise UserError(_empty_bin(bins, b, split))
            for i, chosen in zip(members, _sample(len(members), tokens, wanted, f"{seed}/{split}/{b}")):
                rows[i] = chosen
                weight[i] = 1.0 / (count * len(members) * tokens)
    return SitePlan(count, bin_of, skip, rows, weight)


def _sample(calls: int, tokens: int, wanted: int, seed: str) -> list[np.ndarray]:
    """Token indices per call: `wanted` of all calls * tokens, without replacement, sorted."""
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))
    total = calls * tokens
    chosen = np.sort(generator.choice(total, size=min(wanted, total), replace=False))
    return [chosen[chosen // tokens == call] % tokens for call in range(calls)]


def _empty_bin(bins: Bins | None, b: int, split: str) -> str:
    if bins is None:
        return f"trajectories: no call of split '{split}'; the calibration manifest needs prompts of both splits"
    return (
        f"bins: no recorded {split} step has t in bin {b}, ({bins.edges[b + 1]:g}, {bins.edges[b]:g}]; "
        "use fewer or wider bins, more sampling.steps, or more prompts"
    )


class SiteStatistics:
    """Accumulates one site's statistics, call by call; float32 sums in a fixed order.

    Of the second moments only the panels on and right of the diagonal are summed, which halves the work; `write` fills in
    the rest. A call is taken in slabs of rows, so that what is needed besides the sums does not grow with its tokens.
    """

    def __init__(self, channels: int, plan: SitePlan, device: str, where: str):
        self.plan, self.where = plan, where
        self.shift: torch.Tensor | None = None
        self.second_moment = torch.zeros(channels, channels, device=device)
        self.absmax = torch.zeros(plan.bins, channels, device=device)
        self.total = torch.zeros(plan.bins, channels, device=device)
        self.tokens = [0] * plan.bins
        self.samples: dict[str, list[torch.Tensor]] = {f"{kind}.{b}": [] for kind in SAMPLES for b in range(plan.bins)}

    def add(self, x: torch.Tensor, calls: list[Call], positions: range) -> None:
        """x [B, T, K]: the site's input for the calls at `positions` of the plan. Raises UserError for NaN or Inf."""
        for tokens, call, i in zip(x, calls, positions):
            if self.plan.skip[i]:
                continue
            b = self.plan.bin[i]
            rows = torch.from_numpy(self.plan.rows[i]).to(x.device)
            self.samples[f"{SPLITS[call.split]}.{b}"].append(tokens[rows].cpu())
            calibration = call.split == "calibration"
            if calibration and self.shift is None:
                self.shift = tokens.mean(0, dtype=torch.float32)
            for slab in tokens.split(SLAB):
                slab = slab.float()
                largest = slab.abs().amax(0)
                if not torch.isfinite(largest).all():
                    where = f"{self.where} (prompt {call.prompt}, t = {call.t:g})"
                    raise UserError(f"{where}: NaN or Inf in a calibration activation; check the model, or use another compute.dtype")
                if calibration:
                    torch.maximum(self.absmax[b], largest, out=self.absmax[b])
                    self._accumulate(slab, b, self.plan.weight[i], x.dtype)

    def _accumulate(self, slab: torch.Tensor, b: int, weight: float, dtype: torch.dtype) -> None:
        self.total[b] += slab.sum(0)
        self.tokens[b] += len(slab)
        centred = slab - self.shift
        with _products_for(dtype):
            for start, end in _panels(len(self.second_moment)):
                self.second_moment[start:end, start:].addmm_(centred[:, start:end].T, centred[:, start:], alpha=weight)

    def write(self, folder: Path) -> None:
        """Write the group of `write_activations`."""
        self._fill_below_panels()
        counts = torch.tensor(self.tokens, device=self.total.device).unsqueeze(1)
        tensors = {"shift": self.shift, "second_moment": self.second_moment, "absmax": self.absmax, "mean": self.total / counts}
        write_activations(folder, tensors | {name: torch.cat(parts) for name, parts in self.samples.items()}, self.tokens)

    def _fill_below_panels(self) -> None:
        for start, end in _panels(len(self.second_moment)):
            self.second_moment[end:, start:end] = self.second_moment[start:end, end:].T


def _panels(channels: int) -> list[tuple[int, int]]:
    return [(start, min(start + PANEL, channels)) for start in range(0, channels, PANEL)]


@contextmanager
def _products_for(dtype: torch.dtype) -> Iterator[None]:
    """Let a GPU round bfloat16 activations to TF32 in the products (float32 sums): its 10 bits of mantissa hold their 7, and a
    product in full float32 would take it several times as long as the block itself. CPUs have no TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or dtype == torch.bfloat16
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
