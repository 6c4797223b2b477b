"""The current timestep bin of a denoiser, for all samples of a call or for each."""

import torch
from torch import Tensor


class TimestepBin:
    """Holds the index of the current timestep bin. All quantized linears of a denoiser hold the same object.

    It is a plain object, not a module or a buffer. `Module.to` and the offload hooks of accelerate and diffusers move
    buffers one module at a time, which would give each linear a copy of its own that later writes do not reach. They do
    not find this object, so one write is enough and no copy can be stale. `copy.deepcopy` of a denoiser copies it once.
    """

    def __init__(self) -> None:
        self._index = torch.zeros(1, dtype=torch.int64, device="cpu")

    def set(self, index: Tensor | int) -> None:
        """Make `index` the current bin.

        Args:
            index: int64 on any device, [1] or one value per sample, or an int. A tensor is kept, not copied, and its
                values are not read.
        """
        # Assigned, not copied into the old tensor: that one may be on another device, or made in inference mode.
        self._index = torch.tensor([index], dtype=torch.int64) if isinstance(index, int) else index

    def on(self, device: torch.device) -> Tensor:
        """The current bin, int64 [1] or [samples], on a device. Nothing is copied if it is there already."""
        return self._index.to(device)
