"""Where arithmetic runs in one process: its device and its threads."""

from stepquant.errors import UserError
from stepquant.params import Compute


def prepare_torch(compute: Compute) -> None:
    """Check the device, and fix the thread count: decompositions give other bytes with other threads."""
    import torch

    try:
        torch.empty(0, device=compute.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"compute.device: {compute.device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    torch.set_num_threads(compute.threads)
    torch.set_grad_enabled(False)
