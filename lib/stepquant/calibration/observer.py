"""Accumulates the statistics of a site's input; recipe/site_statistics.py lists what is kept.

The calls of an expert are divided into shards. The statistics of a shard are accumulated by one process, and the shards
are merged in their order (merge.py). Floating-point sums depend on the order of their terms, and this order depends on
the shard size only, so any number of workers gives the same bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from stepquant.calibration.sampling_plan import SamplingPlan
from stepquant.calibration.trajectories import Call
from stepquant.errors import UserError
from stepquant.recipe.site_statistics import SAMPLES

SAMPLE_OF_SPLIT = dict(zip(("calibration", "validation", "heldout"), SAMPLES))
SLAB = 2048  # rows of a call per product: a float32 copy of 13,824 channels is then 113 MB
PANEL = 1024  # columns: the Hessian of 5,120 channels then costs 60 % of the full product, of 13,824 channels 54 %


class SiteObserver:
    """Accumulates one site's statistics over a shard of the calls: float32 sums in a fixed order, on the input's
    device.

    Only the panels of the Hessian on and right of the diagonal are summed, which halves the work; merging fills in the
    rest. A call is processed in slabs of rows, so the working memory does not grow with its number of tokens. Nothing
    is copied to the host while calls are observed, because each copy would make a GPU wait.

    Args:
        channels: number of channels K.
        plan: the tokens that contribute.
        device: device of the sums, that of the inputs.
        where: expert, block and site, for error messages.
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
        self._rows = _rows_on(device, plan)
        self._samples: dict[str, list[torch.Tensor]] = {}
        self._finite: list[tuple[Call, torch.Tensor]] = []

    def observe(self, x: torch.Tensor, calls: list[Call], positions: range) -> None:
        """Add the site's input of some calls.

        Args:
            x: [B, T, K], the input of B calls.
            calls: the B calls.
            positions: their indices in the plan.
        """
        with _hessian_precision(x.dtype):
            for tokens, call, i in zip(x, calls, positions):
                if not self.plan.calls[i].skip:
                    self._observe_call(tokens, call, i)

    def _observe_call(self, tokens: torch.Tensor, call: Call, i: int) -> None:
        b = self.plan.calls[i].bin
        self._samples.setdefault(f"{SAMPLE_OF_SPLIT[call.split]}.{b}", []).append(tokens[self._rows[i]])
        largest = torch.stack([slab.abs().amax(0) for slab in tokens.split(SLAB)]).amax(0).float()
        self._finite.append((call, torch.isfinite(largest).all()))
        if call.split != "calibration":
            return
        if self.shift is None:
            self.shift = tokens.mean(0, dtype=torch.float32)
        torch.maximum(self.absmax[b], largest, out=self.absmax[b])
        for slab in tokens[self.plan.summed(i)].split(SLAB):
            self._accumulate(slab.float(), self.shift, b, self.plan.calls[i].weight)

    def _accumulate(self, slab: torch.Tensor, shift: torch.Tensor, b: int, weight: float) -> None:
        self.total[b] += slab.sum(0)
        self.tokens[b] += len(slab)
        centered = slab - shift
        self.first_moment.add_(centered.sum(0), alpha=weight)
        self.weight += weight * len(slab)
        for start, end in panels(len(self.hessian)):
            self.hessian[start:end, start:].addmm_(centered[:, start:end].T, centered[:, start:], alpha=weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The shard's statistics for `merge_shards`, on the CPU.

        Returns:
            absmax and total [B, K], tokens [B] int64, and the samples of this shard. With a calibration token also
            shift [K] and, over its tokens x, the sums of weight (x - shift)(x - shift)ᵀ, named hessian [K, K]; of
            weight (x - shift), named first_moment [K]; and of weight [] float64.

        Raises:
            UserError: an observed input contains NaN or Inf; names the first such call.
        """
        self._check_finite()
        tensors = {"absmax": self.absmax, "total": self.total, "tokens": torch.tensor(self.tokens)}
        tensors |= {name: torch.cat(parts) for name, parts in self._samples.items()}
        if self.shift is not None:
            tensors |= {"shift": self.shift, "hessian": self.hessian, "first_moment": self.first_moment}
            tensors["weight"] = torch.tensor(self.weight, dtype=torch.float64)
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def _check_finite(self) -> None:
        flags = torch.stack([flag for _, flag in self._finite]).tolist() if self._finite else []
        for (call, _), finite in zip(self._finite, flags):
            if not finite:
                raise UserError(
                    f"{self.where} (prompt {call.prompt}, t = {call.t:g}): NaN or Inf in a calibration activation; "
                    "check the model, or use another compute.dtype"
                )


def panels(channels: int) -> list[tuple[int, int]]:
    """Column ranges (start, end) of the Hessian; of each panel the rows from `start` on hold sums."""
    return [(start, min(start + PANEL, channels)) for start in range(0, channels, PANEL)]


def _rows_on(device: torch.device | str, plan: SamplingPlan) -> list[torch.Tensor]:
    """The sampled rows of every call, sent to the device as one tensor."""
    rows = [call.rows for call in plan.calls]
    together = torch.from_numpy(np.concatenate(rows)).to(device)
    return list(together.split([len(each) for each in rows]))


@contextmanager
def _hessian_precision(dtype: torch.dtype) -> Iterator[None]:
    """Allow TF32 products on a GPU for bfloat16 activations; other dtypes get IEEE float32. Sums are float32 either
    way.

    TF32 rounds the factors x - shift to 10 bits of mantissa and is several times faster. The held-out error of a W4A4
    layer changes as much as with another order of the sums, in both directions: by at most 0.9 % against 0.8 % on
    seeded layers, 2.5 % against 2.7 % on the demo's sites (benchmarks/tf32_hessian.py).
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
