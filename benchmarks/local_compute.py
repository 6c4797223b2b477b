"""The parameters of work in this process, for what runs stages' work without a params file."""

from typing import Literal

from stepquant.params import Compute


def local_compute(dtype: Literal["float32", "bfloat16", "float16"] = "float32", device: str = "cpu") -> Compute:
    """One thread of this process, on a device and in a dtype, without offloading."""
    return Compute(
        device=device,
        dtype=dtype,
        threads=1,
        offload="none",
        executor="local",
        workers=1,
        address=None,
        gpus_per_unit=0,
    )
