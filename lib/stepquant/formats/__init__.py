"""Number formats of 4 and 8 bits: scales, encoding, decoding and packing. Pure functions of tensors, on any device."""

from stepquant.formats.base import Format, Scales, check_finite, check_groups
from stepquant.formats.nvfp4 import nvfp4_tensor_scale
from stepquant.formats.packing import pack_nibbles, unpack_nibbles
from stepquant.formats.registry import eight_bit_partner, four_bit_names, get_format, weight_scales

__all__ = [
    "Format",
    "Scales",
    "check_finite",
    "check_groups",
    "eight_bit_partner",
    "four_bit_names",
    "get_format",
    "nvfp4_tensor_scale",
    "pack_nibbles",
    "unpack_nibbles",
    "weight_scales",
]
