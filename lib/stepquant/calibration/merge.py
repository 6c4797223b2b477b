"""Merges the statistics of an expert's shards of calls into those of all calls."""

from collections.abc import Iterable
from pathlib import Path

import torch

from stepquant.calibration.observer import panels
from stepquant.calibration.statistics_files import write_statistics
from stepquant.recipe.site_statistics import SAMPLES

ShardSums = dict[str, torch.Tensor]  # what SiteObserver.tensors returns


class MergedShards:
    """Statistics of the shards added so far. The sums of all shards refer to the shift of the first one that has any.

    Args:
        first: the first shard; its tensors are not changed.
    """

    def __init__(self, first: ShardSums):
        self.absmax = torch.zeros_like(first["absmax"])
        self.total = torch.zeros_like(first["total"])
        self.tokens = torch.zeros_like(first["tokens"])
        self.samples: dict[str, list[torch.Tensor]] = {}
        self.centered: tuple[torch.Tensor, torch.Tensor] | None = None  # shift, Hessian
        self.add(first)

    def add(self, shard: ShardSums) -> None:
        """Add the next shard. Tensors are copied, so that a memory-mapped file can be released."""
        for name in shard:
            if name.startswith(SAMPLES):
                self.samples.setdefault(name, []).append(shard[name].clone())
        self.absmax = torch.maximum(self.absmax, shard["absmax"])
        self.total = self.total + shard["total"]
        self.tokens = self.tokens + shard["tokens"]
        if "shift" not in shard:
            return
        if self.centered is None:
            self.centered = shard["shift"].clone(), shard["hessian"].clone()
        else:
            shift, hessian = self.centered
            hessian += shard["hessian"]
            _recenter(hessian, shard["shift"] - shift, shard["first_moment"], shard["weight"].item())

    def write(self, folder: Path) -> None:
        """Write the site's group."""
        assert self.centered is not None, "the sampling plan has calibration calls for every bin"
        shift, hessian = self.centered
        _fill_below_panels(hessian)
        mean = self.total / self.tokens.unsqueeze(1)
        tensors = {"shift": shift, "hessian": hessian, "absmax": self.absmax, "mean": mean}
        for kind in SAMPLES:
            for name in (f"{kind}.{b}" for b in range(len(self.tokens))):
                tensors[name] = torch.cat(self.samples[name])
        write_statistics(folder, tensors, self.tokens.tolist())


def merge_shards(folder: Path, shards: Iterable[ShardSums]) -> None:
    """Merge the shards of a site and write its group; one shard is in memory at a time.

    Args:
        folder: the site's group.
        shards: the statistics of every shard, in the order of the calls.
    """
    remaining = iter(shards)
    merged = MergedShards(next(remaining))
    for shard in remaining:
        merged.add(shard)
    merged.write(folder)


def _recenter(hessian: torch.Tensor, distance: torch.Tensor, first_moment: torch.Tensor, weight: float) -> None:
    """Change the point of a sum of squares in place: with d = old point - new point, add d mᵀ + m dᵀ + weight d dᵀ.

    Exact up to rounding, and d is as small as the channel means differ between calls, so float32 loses nothing.
    """
    hessian.addr_(distance, first_moment)
    hessian.addr_(first_moment, distance)
    hessian.addr_(distance, distance, alpha=weight)


def _fill_below_panels(hessian: torch.Tensor) -> None:
    """The Hessian is symmetric: copy what is right of the diagonal panels to the place below them."""
    for start, end in panels(len(hessian)):
        hessian[end:, start:end] = hessian[start:end, end:].T
