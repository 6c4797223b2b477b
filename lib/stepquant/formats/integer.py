"""Symmetric integers with one scale per group or per row: what int4, int8 and int8_row have in common.

The scale is absmax * clip / largest, where `largest` is 7 or 127 (SVDQuant, arXiv 2411.05007, section 3, q_max). It is
rounded to the dtype in which it is stored before any value is divided by it, so encoding and decoding use the same
number. The code -largest - 1 occurs only when a clip below 1 makes a value saturate there.
"""

from typing import ClassVar

import torch
from torch import Tensor

from stepquant.formats.base import Format, Scales


class IntegerFormat(Format):
    """A format with integer elements; the subclass defines their number of bits and their codes.

    Attributes:
        largest: the element of the group's largest magnitude.
        smallest_scale: in place of smaller scales, with which zero would be divided by zero. An all-zero group decodes
            to exact zeros.
    """

    largest: ClassVar[int]
    scale_dtype = torch.bfloat16
    smallest_scale: ClassVar[float] = torch.finfo(torch.bfloat16).tiny

    def tensor_scale(self, x: Tensor) -> None:
        """None: integers have no per-tensor scale."""
        return None

    def round_to_grid(self, y: Tensor, scale: Tensor) -> Tensor:
        """y rounded in place to -largest - 1..largest."""
        return y.round_().clamp_(-self.largest - 1, self.largest)

    def _scales(self, amax: Tensor, exponent_offset: int | Tensor, rounding: str, tensor: Tensor | None) -> Scales:
        scale = (amax / self.largest).clamp(min=self.smallest_scale)
        return Scales(_to_bfloat16(scale) if self.scale_dtype == torch.bfloat16 else scale, None)

    def _scale(self, scales: Scales) -> Tensor:
        return scales.group.float().unsqueeze(-1)

    def _reciprocal(self, scales: Scales) -> Tensor:
        return scales.group.float().reciprocal()

    def _divide(self, groups: Tensor, scales: Scales) -> Tensor:
        return groups / self._scale(scales)  # not bit for bit the product with the rounded reciprocal


def _to_bfloat16(a: Tensor) -> Tensor:
    """a (float32) rounded to bfloat16, to nearest even, in integers: torch.compile may drop a cast that it fuses."""
    bits = a.view(torch.int32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & ~0xFFFF
    return rounded.view(torch.float32).bfloat16()
