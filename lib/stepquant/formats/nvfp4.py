"""nvfp4: E2M1 elements, an E4M3 scale per 16 values, a float32 scale per tensor (NVIDIA, arXiv 2509.25149, section 2).

Storage contract of x [..., K]:
    codes   uint8 [..., K]               E2M1, see e2m1.py
    scales  float8_e4m3fn [..., K/16]    2^-6 .. 448
    tensor  float32 []                   1 for dynamic activations
    x = value(code) * (tensor * scale)

The group scale is absmax * clip / 6 / tensor, rounded to E4M3 and limited to its normal numbers; x is multiplied by
(1 / tensor) / scale before rounding, in this order. Both are what torchao's NVFP4Tensor does.
"""

import torch
from torch import Tensor

from stepquant.errors import UserError
from stepquant.formats.base import Scales
from stepquant.formats.e2m1 import E2M1_MAX, E2M1Format

_E4M3 = torch.finfo(torch.float8_e4m3fn)
# (1 / tensor) / scale must stay finite for the smallest group scale, 2^-6.
_SMALLEST_TENSOR_SCALE = 2.0**-121


class Nvfp4(E2M1Format):
    """E2M1 elements with an E4M3 scale per group and a tensor scale; the header of this file states the layout."""

    name = "nvfp4"
    group = 16
    bits = 4 + 8 / 16
    scale_dtype = torch.float8_e4m3fn
    has_tensor_scale = True

    def tensor_scale(self, x: Tensor) -> Tensor:
        """As `nvfp4_tensor_scale`."""
        return nvfp4_tensor_scale(x)

    def _scales(self, amax: Tensor, exponent_offset: int | Tensor, rounding: str, tensor: Tensor | None) -> Scales:
        if tensor is None:
            tensor = torch.ones((), dtype=torch.float32, device=amax.device)
        scale = amax / E2M1_MAX / tensor
        return Scales(scale.clamp(_E4M3.tiny, _E4M3.max).to(torch.float8_e4m3fn), tensor)

    def _scale(self, scales: Scales) -> Tensor:
        return (_tensor_scale_of(scales) * scales.group.float()).unsqueeze(-1)

    def _reciprocal(self, scales: Scales) -> Tensor:
        return _tensor_scale_of(scales).reciprocal() / scales.group.float()


def nvfp4_tensor_scale(x: Tensor) -> Tensor:
    """Per-tensor scale absmax / (6 * 448) of x (any shape, any float dtype), float32 []; 1 if x is all zeros.

    Rounded to bfloat16, because vLLM-Omni stores it so and the group scales must be computed with the stored value.
    """
    amax = x.abs().amax().float()
    scale = (amax / (E2M1_MAX * _E4M3.max)).clamp(min=_SMALLEST_TENSOR_SCALE).bfloat16().float()
    return torch.where(amax > 0, scale, 1.0)


def _tensor_scale_of(scales: Scales) -> Tensor:
    if scales.tensor is None:
        raise UserError("nvfp4 scales: the per-tensor scale is missing; expected a float32 scalar")
    return scales.tensor
