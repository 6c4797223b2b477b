"""Accumulates the statistics of a site's input, per timestep bin; calibration/activations.py says what is kept.

The calls of an expert are cut into shards, and each shard's statistics are accumulated on their own, by whichever process,
and added up in the order of the shards. Floating-point sums depend on their order, and this order depends on the size of a
shard alone: one worker and many give the same bytes. Samples are chosen before any block runs, so that they do not
even depend on the shards.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stepquant.calibration.statistics_files import write_statistics
from stepquant.calibration.trajectories import Call
from stepquant.errors import UserError
from stepquant.models.bins import Bins
from stepquant.recipe.site_statistics import SAMPLES

SPLITS = dict(zip(("calibration", "validation", "heldout"), SAMPLES))
SLAB = 2048  # rows of a call at a time: float32 copies of 13,824 channels are then 113 MB each
PANEL = 1024  # columns: the second moments of 5,120 channels then cost 60 % of the full product, of 13,824 54 %


@dataclass(frozen=True)
class SamplingPlan:
    """Which tokens of which calls a site's statistics take.

    bin and rows are per call, in the order of the calls; rows are the sampled token indices inside the call. skip marks
    calls that repeat what another call showed already (text tokens are the same at every step). stride: sums take every so many-th token
    of a call, from another one in each call; weight: that of each token which they take.
    """

    bins: int
    bin: list[int]
    skip: list[bool]
    rows: list[np.ndarray]
    weight: list[float]
    stride: int


def plan_sampling(
    calls: list[Call], bins: Bins | None, tokens: int, samples: dict[str, int], seed: int, *, stride: int
) -> SamplingPlan:
    """Choose a site's tokens before any block runs, so that the choice depends on nothing but its arguments.

    bins: None for a site that does not depend on t (one bin, one call per prompt and branch). tokens: per call.
    samples: tokens to keep per bin, by split. stride: of the tokens that count; a site without t sees few, which all do. Raises
    UserError if a bin has no recorded call of some split.
    """
    stride = 1 if bins is None else min(stride, tokens)
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
            summed = sum(len(range(tokens)[_every(stride, i)]) for i in members)
            for i, chosen in zip(members, _sample(len(members), tokens, wanted, f"{seed}/{split}/{b}")):
                rows[i] = chosen
                weight[i] = 1.0 / (count * summed)
    return SamplingPlan(count, bin_of, skip, rows, weight, stride)


def _every(stride: int, call: int) -> slice:
    """The tokens of a call that go into the sums: calls take turns, so that every place in the video is seen."""
    return slice(call % stride, None, stride)


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


class SiteObserver:
    """Accumulates one site's statistics over a shard of the calls, call by call; float32 sums in a fixed order.

    Of the second moments only the panels on and right of the diagonal are summed, which halves the work; `merge_shards`
    fills in the rest. A call is taken in slabs of rows, so that what is needed besides the sums does not grow with its tokens.
    """

    def __init__(self, channels: int, plan: SamplingPlan, device: torch.device | str, where: str):
        self.plan, self.where = plan, where
        self.shift: torch.Tensor | None = None
        self.weight = 0.0
        self.hessian = torch.zeros(channels, channels, device=device)
        self.first_moment = torch.zeros(channels, device=device)
        self.absmax = torch.zeros(plan.bins, channels, device=device)
        self.total = torch.zeros(plan.bins, channels, device=device)
        self.tokens = [0] * plan.bins
        self.samples: dict[str, list[torch.Tensor]] = {}

    def observe(self, x: torch.Tensor, calls: list[Call], positions: range) -> None:
        """x [B, T, K]: the site's input for the calls at `positions` of the plan. Raises UserError for NaN or Inf."""
        for tokens, call, i in zip(x, calls, positions):
            if self.plan.skip[i]:
                continue
            b = self.plan.bin[i]
            rows = torch.from_numpy(self.plan.rows[i]).to(x.device)
            self.samples.setdefault(f"{SPLITS[call.split]}.{b}", []).append(tokens[rows].cpu())
            calibration = call.split == "calibration"
            if calibration and self.shift is None:
                self.shift = tokens.mean(0, dtype=torch.float32)
            largest = torch.stack([slab.abs().amax(0) for slab in tokens.split(SLAB)]).amax(0).float()
            if not torch.isfinite(largest).all():
                where = f"{self.where} (prompt {call.prompt}, t = {call.t:g})"
                raise UserError(
                    f"{where}: NaN or Inf in a calibration activation; check the model, or use another compute.dtype"
                )
            if calibration:
                torch.maximum(self.absmax[b], largest, out=self.absmax[b])
                for slab in tokens[_every(self.plan.stride, i)].split(SLAB):
                    self._accumulate(slab.float(), b, self.plan.weight[i], x.dtype)

    def _accumulate(self, slab: torch.Tensor, b: int, weight: float, dtype: torch.dtype) -> None:
        self.total[b] += slab.sum(0)
        self.tokens[b] += len(slab)
        centered = slab - self.shift
        self.first_moment.add_(centered.sum(0), alpha=weight)
        self.weight += weight * len(slab)
        with _products_for(dtype):
            for start, end in _panels(len(self.hessian)):
                self.hessian[start:end, start:].addmm_(centered[:, start:end].T, centered[:, start:], alpha=weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What `merge_shards` needs of this shard. Without a calibration token there is no second moment.

        absmax, total [B, K]; tokens [B]; and, about the shard's own shift [K], sums over its tokens x of weight times
        (x - shift)(x - shift)ᵀ [K, K], of weight times (x - shift) [K], and of the weights [].
        """
        tensors = {"absmax": self.absmax, "total": self.total, "tokens": torch.tensor(self.tokens)}
        tensors |= {name: torch.cat(parts) for name, parts in self.samples.items()}
        if self.shift is not None:
            tensors |= {"shift": self.shift, "hessian": self.hessian, "first_moment": self.first_moment}
            tensors["weight"] = torch.tensor(self.weight, dtype=torch.float64)
        return {name: tensor.cpu() for name, tensor in tensors.items()}


def merge_shards(folder: Path, shards: Iterable[dict[str, torch.Tensor]]) -> None:
    """Add up what the shards of all calls hold, in their order, one at a time, and write the site's group."""
    shift = hessian = absmax = total = tokens = None
    samples: dict[str, list[torch.Tensor]] = {}
    for shard in shards:
        for name in shard:
            if name.startswith(SAMPLES):
                samples.setdefault(name, []).append(shard[name].clone())  # a shard may be a mapped file: let go of it
        if absmax is None:
            absmax, total, tokens = (shard[name].clone() for name in ("absmax", "total", "tokens"))
        else:
            absmax, total, tokens = (
                torch.maximum(absmax, shard["absmax"]),
                total + shard["total"],
                tokens + shard["tokens"],
            )
        if "shift" in shard and hessian is None:
            shift, hessian = shard["shift"].clone(), shard["hessian"].clone()
        elif "shift" in shard:
            hessian += shard["hessian"]
            _recenter(hessian, shard["shift"] - shift, shard["first_moment"], shard["weight"].item())
    _fill_below_panels(hessian)
    tensors = {"shift": shift, "hessian": hessian, "absmax": absmax, "mean": total / tokens.unsqueeze(1)}
    tensors |= {
        name: torch.cat(samples[name]) for kind in SAMPLES for name in (f"{kind}.{b}" for b in range(len(tokens)))
    }
    write_statistics(folder, tensors, tokens.tolist())


def _recenter(hessian: torch.Tensor, distance: torch.Tensor, first_moment: torch.Tensor, weight: float) -> None:
    """Refer what was summed about a point to another: with d = point - other, add d mᵀ + m dᵀ + weight d dᵀ in place.

    Exact but for rounding, and d is as small as the channel means differ between calls, so float32 loses nothing.
    """
    hessian.addr_(distance, first_moment)
    hessian.addr_(first_moment, distance)
    hessian.addr_(distance, distance, alpha=weight)


def _fill_below_panels(hessian: torch.Tensor) -> None:
    for start, end in _panels(len(hessian)):
        hessian[end:, start:end] = hessian[start:end, end:].T


def _panels(channels: int) -> list[tuple[int, int]]:
    return [(start, min(start + PANEL, channels)) for start in range(0, channels, PANEL)]


@contextmanager
def _products_for(dtype: torch.dtype) -> Iterator[None]:
    """Let a GPU round bfloat16 activations to TF32 in the products (float32 sums): its 10 bits of mantissa hold their 7, and a
    product in full float32 would take it several times as long as the block itself. CPUs have no TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
