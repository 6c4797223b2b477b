"""What decides the numbers of one process beside its inputs: device, dtype and threads. Part of every unit's key."""

from typing import TYPE_CHECKING

from stepquant.errors import UserError
from stepquant.params import Compute

if TYPE_CHECKING:
    import torch


def prepare_torch(compute: Compute) -> None:
    """Check the device, and fix the thread count: decompositions give other bytes with other threads."""
    import torch

    try:
        torch.empty(0, device=compute.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"compute.device: {compute.device!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    torch.set_num_threads(compute.threads)
    torch.set_grad_enabled(False)


def torch_dtype(name: str) -> "torch.dtype":
    """The dtype that `compute.dtype` names."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
