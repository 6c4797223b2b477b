"""The dtype in which a checkpoint stores what is not quantized."""

import torch

from stepquant.models.families.description import DenoiserClass

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def stored_dtype(key: str, found: torch.dtype, computed: torch.dtype, denoiser: DenoiserClass) -> torch.dtype:
    """The dtype of one tensor of a denoiser's rest: never wider than what the model computes with.

    Args:
        key: of the tensor.
        found: its dtype in the source.
        computed: dtype of the arithmetic with which the checkpoint was calibrated (`compute.dtype`).
        denoiser: says which modules diffusers keeps in float32 whatever the dtype.

    Returns:
        `computed` for a wider float, so that the checkpoint holds the very values that were calibrated with; bfloat16
        for float8, which is exact, and which every loader reads; otherwise `found`.
    """
    if found in FLOAT8:
        return torch.bfloat16
    wider = found.is_floating_point and found.itemsize > computed.itemsize
    return computed if wider and not denoiser.keeps_float32(key) else found
