"""Accumulates the statistics of a site's input, per timestep bin; calibration/activations.py says what is kept.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stepquant.calibration.arrays import write_group
from stepquant.calibration.trajectories import Call
from stepquant.errors import UserError
from stepquant.models.bins import Bins

SPLITS = {"calibration": "search", "heldout": "heldout"}


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
    """Accumulates one site's statistics, call by call; float32 sums in a fixed order."""

    def __init__(self, channels: int, plan: SitePlan, device: str, where: str):
        self.plan, self.where = plan, where
        self.shift: torch.Tensor | None = None
        self.second_moment = torch.zeros(channels, channels, device=device)
        self.absmax = torch.zeros(plan.bins, channels, device=device)
        self.total = torch.zeros(plan.bins, channels, device=device)
        self.tokens = [0] * plan.bins
        self.samples: dict[str, list[torch.Tensor]] = {f"{kind}.{b}": [] for b in range(plan.bins) for kind in SPLITS.values()}

    def add(self, x: torch.Tensor, calls: list[Call], positions: range) -> None:
        """x [B, T, K]: the site's input for the calls at `positions` of the plan. Raises UserError for NaN or Inf."""
        finite = torch.isfinite(x).flatten(1).all(1).tolist()
        if not all(finite):
            where = f"{self.where} (prompt {calls[finite.index(False)].prompt}, t = {calls[finite.index(False)].t:g})"
            raise UserError(f"{where}: NaN or Inf in a calibration activation; check the model, or use another compute.dtype")
        for tokens, call, i in zip(x, calls, positions):
            if self.plan.skip[i]:
                continue
            b = self.plan.bin[i]
            rows = torch.from_numpy(self.plan.rows[i]).to(x.device)
            self.samples[f"{SPLITS[call.split]}.{b}"].append(tokens[rows].cpu())
            if call.split == "calibration":
                self._accumulate(tokens.float(), b, self.plan.weight[i])

    def _accumulate(self, tokens: torch.Tensor, b: int, weight: float) -> None:
        if self.shift is None:
            self.shift = tokens.mean(0)
        centred = tokens - self.shift
        self.second_moment.addmm_(centred.T, centred, alpha=weight)
        torch.maximum(self.absmax[b], tokens.abs().amax(0), out=self.absmax[b])
        self.total[b] += tokens.sum(0)
        self.tokens[b] += len(tokens)

    def write(self, folder: Path) -> None:
        """Write the group described above."""
        counts = torch.tensor(self.tokens, device=self.total.device).unsqueeze(1)
        tensors = {"shift": self.shift, "second_moment": self.second_moment, "absmax": self.absmax, "mean": self.total / counts}
        tensors |= {name: torch.cat(parts) for name, parts in self.samples.items()}
        write_group(folder, tensors, {"tokens": self.tokens})
