"""What decides the numbers of a process besides its inputs: device, dtype, threads, precision, library versions.

All of it enters the key of a unit: this file as code, device, dtype and threads as parameters, and the rest as
`numerics_versions`.
"""

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from stepquant.errors import UserError
from stepquant.params import Compute

if TYPE_CHECKING:
    import torch

# Whose version can change a number of any unit: the products and decompositions, the sampled tokens, the blocks.
ARITHMETIC = ("torch", "numpy", "diffusers")
# And of the units that sample videos: they encode prompts and resize pictures, and their files are encoded videos.
SAMPLING = ("transformers", "tokenizers", "ftfy", "pillow", "av")


def prepare_torch(compute: Compute) -> None:
    """Prepare this process for the arithmetic that the parameters ask for.

    Raises:
        UserError: `compute.device` cannot be used in this process.
    """
    prepare_arithmetic(compute.threads)
    check_device(compute.device)


def prepare_arithmetic(threads: int) -> None:
    """Fix threads, precision and determinism for the whole process. Does not touch a GPU.

    - Threads: matrix decompositions give other bytes with another number of threads.
    - Deterministic algorithms: an operation without one raises an error instead of giving other bytes in each run.
      cuBLAS needs a workspace of fixed size for it, set before its first use. torch would also fill every new tensor
      with NaN; nothing here reads a tensor before it is written, so that cost is saved.
    - IEEE float32 everywhere: by default cuDNN rounds the inputs of float32 convolutions to TF32 (10 bits).
    - No cuDNN benchmark: it chooses an algorithm by its run time.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Any: torch declares no types for these settings of its modules.
    deterministic: Any = torch.utils.deterministic
    backends: Any = torch.backends
    deterministic.fill_uninitialized_memory = False
    backends.cudnn.benchmark = False
    for place in (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn):
        place.fp32_precision = "ieee"
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def check_device_name(device: str) -> None:
    """Refuse a name that is no torch device, without touching the device.

    Raises:
        UserError: torch does not know the name.
    """
    import torch

    try:
        torch.device(device)
    except RuntimeError as error:
        raise _unusable(device, error) from None


def check_device(device: str) -> None:
    """Allocate on a device. On a GPU this creates a CUDA context.

    Raises:
        UserError: The device does not exist or cannot be used here.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(device, error) from None


def numerics_versions(device: str, packages: tuple[str, ...] = ARITHMETIC) -> dict[str, str]:
    """The versions that decide numbers on a device, as part of the key of a unit.

    Args:
        device: A torch device. For a GPU its model and libraries are included; the index is not, since two GPUs of one
            model give the same bytes. The driver is not either: kernels and their choice come with the libraries.
        packages: Names of installed distributions. Only their metadata is read; nothing is imported.

    Returns:
        Name -> version. For a GPU also `gpu`, `compute capability`, `cuda` and `cudnn`.
    """
    found = {name: version(name) for name in packages}
    if not device.startswith("cuda"):
        return found
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return found | {
        "gpu": torch.cuda.get_device_name(device),
        "compute capability": f"{major}.{minor}",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def torch_dtype(name: str) -> "torch.dtype":
    """The dtype that `compute.dtype` names."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _unusable(device: str, error: Exception) -> UserError:
    return UserError(f"compute.device: {device!r} cannot be used here: {str(error).splitlines()[0]}")
