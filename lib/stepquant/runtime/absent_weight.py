"""What a quantized linear has in place of `weight`."""

from typing import Any

import torch
from torch import Tensor

from stepquant.errors import InvalidInput

# What may be asked of it: libraries size and place what they put beside a linear (LoRA) by its weight.
_FACTS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "requires_grad")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__),
    }
)


class AbsentWeight(Tensor):
    """A weight with a shape, a dtype and a device, but without values and memory.

    Whatever reads or writes values is refused. So a LoRA can be loaded, scaled, switched and unloaded beside the
    linear, and every way of fusing it into the weight fails.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> "AbsentWeight":
        # torch has no types for this function.
        made: AbsentWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _FACTS:
            raise _refusal()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise _refusal()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AbsentWeight({tuple(self.shape)}, {self.dtype}, {self.device})"


def _refusal() -> InvalidInput:
    return InvalidInput(
        "weight of a quantized linear: it has no values that could be read or changed. Only the 4-bit codes of a "
        "transformed weight are stored, so nothing can be fused into it: neither a LoRA nor a projection. "
        "Keep LoRAs loaded beside it (load_lora_weights, set_adapters), or fuse them into the source model before it "
        "is quantized"
    )
