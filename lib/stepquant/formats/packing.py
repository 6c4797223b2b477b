"""Two 4-bit codes per byte.

Storage contract: codes uint8 [..., K] with values 0..15 <-> packed uint8 [..., K/2];
bits 0..3 of byte j hold column 2j, bits 4..7 hold column 2j + 1.
"""

import torch
from torch import Tensor

from stepquant.errors import UserError


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., K/2] from codes uint8 [..., K] in 0..15. Raises UserError if K is odd."""
    if codes.shape[-1] % 2:
        raise UserError(f"packing: {codes.shape[-1]} columns; allowed: an even number, since a byte holds two codes")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Codes uint8 [..., K] from packed uint8 [..., K/2]."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
