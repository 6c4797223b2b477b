"""4-bit number formats: scales, encoding, decoding and packing. Pure functions of tensors, on any device."""

from stepquant.formats.base import Format, Scales, check_finite, check_groups
from stepquant.formats.nvfp4 import nvfp4_tensor_scale
from stepquant.formats.packing import pack_nibbles, unpack_nibbles
from stepquant.formats.registry import get_format, weight_scales

__all__ = [
    "Format",
    "Scales",
    "check_finite",
    "check_groups",
    "get_format",
    "nvfp4_tensor_scale",
    "pack_nibbles",
    "unpack_nibbles",
    "weight_scales",
]
