"""Block-Hadamard rotation of the smoothed input: spreads a token's outliers over adjacent channels before quantization.

    x/s -> rotate(x/s, size),   residual -> rotate(residual, size):   their product is unchanged

The Sylvester matrix of order `size`, divided by sqrt(size), is symmetric and orthogonal, so a rotation is its own
inverse.

Its benefit depends on format and site. Without it the W4A4 error of synthetic heavy-tailed layers is 51.4 % larger
for int4, 21.6 % for mxfp4 and unchanged for nvfp4 (MR-GPTQ, arXiv 2509.23202, explains why). On the demo model the
differences are 5.9, 2.3 and 0.4 %, and some sites are better without it, so the size is selected per site
(docs/experiments/recipe-ablations.md).
"""

import torch
from torch import Tensor

from stepquant.errors import UserError


def rotate(x: Tensor, size: int) -> Tensor:
    """Rotates every `size` adjacent channels of x.

    The matrix is built in each call; a caller that rotates often keeps `hadamard` and calls `rotate_by`.

    Args:
        x: [..., K] of any float dtype.
        size: The Hadamard size; 0 returns x unchanged.

    Returns:
        The rotated x, in its shape and dtype.

    Raises:
        UserError: As `check_rotation`.
    """
    if size == 0:
        return x
    check_rotation(size, x.shape[-1])
    return rotate_by(x, hadamard(size, device=x.device, dtype=x.dtype))


def rotate_by(x: Tensor, matrix: Tensor) -> Tensor:
    """Rotates x [..., K] by a given matrix.

    Args:
        x: [..., K]; K must be a multiple of the matrix order.
        matrix: [size, size] from `hadamard`, on the device and in the dtype of x.

    Returns:
        The same bytes as `rotate(x, size)`.
    """
    return (torch.unflatten(x, -1, (-1, matrix.shape[0])) @ matrix).flatten(-2)


def check_rotation(size: int, K: int, what: str = "rotation") -> None:
    """Raises UserError, with the name `what`, unless size is 0 or a power of two that divides K."""
    if size and (size < 0 or size.bit_count() != 1 or K % size):
        raise UserError(
            f"{what}: Hadamard size {size} for {K} channels; allowed: 0, or a power of two that divides {K}"
        )


def hadamard(order: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthonormal Sylvester-Hadamard matrix [order, order].

    Args:
        order: A power of two.
        device: Where the matrix is built; None is torch's default device.
        dtype: The dtype of the result. The values are computed in float32 and rounded once.
    """
    H, two = torch.ones(1, 1, device=device), torch.ones(2, 2, device=device)
    two[1, 1].fill_(-1)
    while H.shape[0] < order:
        H = torch.kron(two, H)
    return (H / float(order**0.5)).to(dtype)
