"""Number formats of 4 and 8 bits: scales, encoding, decoding and packing. Pure functions of tensors, on any device."""

from stepquant.formats.base import Format, Scales, check_finite, check_groups
from stepquant.formats.nvfp4 import nvfp4_tensor_scale
from stepquant.formats.packing import pack_nibbles, unpack_nibbles
from stepquant.formats.registry import activation_formats, eight_bit_partner, get_format, weight_formats, weight_scales

__all__ = [
    "Format",
    "Scales",
    "activation_formats",
    "check_finite",
    "check_groups",
    "eight_bit_partner",
    "get_format",
    "nvfp4_tensor_scale",
    "pack_nibbles",
    "unpack_nibbles",
    "weight_formats",
    "weight_scales",
]
