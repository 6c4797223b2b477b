"""Block-Hadamard rotation of the smoothed input: spreads a token's outliers over the block before they are quantized.

    x/s -> rotate(x/s, b),   residual -> rotate(residual, b):   their product is unchanged

The Sylvester matrix of order b divided by sqrt(b) is symmetric and orthogonal, so a rotation is its own inverse.

What it is worth depends on format and site: on heavy-tailed layers a third less W4A4 error for int4, 14 % for mxfp4, nothing for
nvfp4 (as MR-GPTQ, arXiv 2509.23202, explains); on the demo model 30 % at `ffn.down` in int4, and little or a loss elsewhere,
so it is chosen per site (docs/recipe.md).
"""

import torch
from torch import Tensor

from stepquant.errors import UserError


def rotate(x: Tensor, block: int) -> Tensor:
    """x [..., K] with each run of `block` channels rotated, in x's dtype; block 0 leaves x as it is.

    Raises UserError as `check_rotation`.
    """
    if block == 0:
        return x
    check_rotation(block, x.shape[-1])
    return (x.unflatten(-1, (-1, block)) @ hadamard(block).to(x)).flatten(-2)


def check_rotation(block: int, K: int, what: str = "rotation") -> None:
    """Raises UserError naming `what` unless block is 0 or a power of two that divides K."""
    if block and (block < 0 or block.bit_count() != 1 or K % block):
        raise UserError(f"{what}: block {block} for {K} channels; allowed: 0, or a power of two that divides {K}")


def hadamard(order: int) -> Tensor:
    """Orthonormal Sylvester-Hadamard matrix, float32 [order, order], for a power of two."""
    H = torch.ones(1, 1)
    while H.shape[0] < order:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H / order**0.5
