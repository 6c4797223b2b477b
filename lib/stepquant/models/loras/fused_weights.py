"""Weights to which LoRAs are added as they are read. Nothing is written, and one tensor at a time is in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from stepquant.errors import DamagedFile
from stepquant.models.weights import TensorInfo, Weights


class Update(Protocol):
    """What one LoRA adds to one tensor."""

    @property
    def file(self) -> Path:
        """The LoRA's file."""
        ...

    def values(self, dtype: torch.dtype) -> Tensor:
        """What is added, computed in `dtype`; its shape is that of the tensor, or flattened after the first axis."""
        ...


@dataclass(frozen=True)
class LowRankUpdate:
    """scale * up @ down (Hu et al. 2021, arXiv 2106.09685, section 4.1; scale is alpha / r times the LoRA's weight).

    Attributes:
        file: safetensors file.
        down: key of A, [r, K] or [r, C, *kernel].
        up: key of B, [N, r] or [N, r, 1, 1, 1].
        scale: factor.
    """

    file: Path
    down: str
    up: str
    scale: float

    def values(self, dtype: torch.dtype) -> Tensor:
        """The update, [N, K] (K over all of a convolution's kernel)."""
        with safe_open(self.file, framework="pt", device="cpu") as file:
            up: Tensor = file.get_tensor(self.up)
            down: Tensor = file.get_tensor(self.down)
        return (up.to(dtype).flatten(1) @ down.to(dtype).flatten(1)) * self.scale


@dataclass(frozen=True)
class Difference:
    """scale times a tensor of the LoRA file, which has the shape of the tensor that it changes.

    Attributes:
        file: safetensors file.
        key: of the difference.
        scale: factor.
    """

    file: Path
    key: str
    scale: float

    def values(self, dtype: torch.dtype) -> Tensor:
        """The update."""
        with safe_open(self.file, framework="pt", device="cpu") as file:
            difference: Tensor = file.get_tensor(self.key)
        return difference.to(dtype) * self.scale


class FusedWeights(Weights):
    """A component's weights with updates added.

    The sum is computed in float32 (float64 where that is stored), in the order of the updates, and rounded once to the
    stored dtype. A tensor stored in 8-bit floating point becomes bfloat16, because most of an update would be lost in
    3 bits of mantissa.

    Args:
        weights: of the component.
        updates: by key of the tensor that they change.
    """

    def __init__(self, weights: Weights, updates: Mapping[str, Sequence[Update]]):
        super().__init__(weights.folder, {key: _fused_info(weights.info(key), key in updates) for key in weights})
        self._updates = dict(updates)

    @property
    def changed(self) -> tuple[str, ...]:
        """Keys of the tensors that have an update, sorted."""
        return tuple(sorted(self._updates))

    def get(self, key: str) -> Tensor:
        """The tensor on the CPU with its updates. Raises DamagedFile if there is none, or for infinite values."""
        stored = super().get(key)
        updates = self._updates.get(key, ())
        if not updates:
            return stored
        total = stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32, copy=True)
        for update in updates:
            total += update.values(total.dtype).view(total.shape)
        fused = total.to(self.dtype(key))
        if not torch.isfinite(fused).all():
            files = ", ".join(str(update.file) for update in updates)
            raise DamagedFile(
                f"{key} with {files}: infinite or not a number in {fused.dtype}; wrong weight, or damaged"
            )
        return fused


def _fused_info(info: TensorInfo, changed: bool) -> TensorInfo:
    return replace(info, dtype=torch.bfloat16) if changed and info.dtype.itemsize == 1 else info
