"""Block-Hadamard rotation of the smoothed input: spreads a token's outliers over adjacent channels before quantization.

    x/s -> rotate(x/s, size),   residual -> rotate(residual, size):   their product is unchanged

The matrix of order `size`, divided by sqrt(size), is symmetric and orthogonal, so a rotation is its own inverse. There
are two kinds:

    sylvester   products of [[1, 1], [1, -1]]; its first row and column have no sign changes, so that the sum of a
                group's channels goes into one channel
    regular     products of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], so powers of four; the sums
                of all rows are equal. ComfyUI rotates with it (ConvRot)

Its benefit depends on format and site. Without it the W4A4 error of synthetic heavy-tailed layers is 51.4 % larger
for int4, 21.6 % for mxfp4 and unchanged for nvfp4 (MR-GPTQ, arXiv 2509.23202, explains why). On the demo model the
differences are 5.9, 2.3 and 0.4 %, and some sites are better without it, so the size is selected per site
(docs/experiments/recipe-ablations.md).
"""

import torch
from torch import Tensor

from stepquant.errors import InvalidInput

SYLVESTER, REGULAR = "sylvester", "regular"
# Order of each kind's factor, and where it is -1.
_FACTORS = {SYLVESTER: (2, ((1, 1),)), REGULAR: (4, ((0, 3), (1, 2), (2, 1), (3, 0)))}


def rotate(x: Tensor, size: int, kind: str = SYLVESTER) -> Tensor:
    """Rotates every `size` adjacent channels of x.

    The matrix is built in each call; a caller that rotates often keeps `hadamard` and calls `rotate_by`.

    Args:
        x: [..., K] of any float dtype.
        size: The Hadamard size; 0 returns x unchanged.
        kind: The kind of the Hadamard matrix.

    Returns:
        The rotated x, in its shape and dtype.

    Raises:
        InvalidInput: As `check_rotation`.
    """
    if size == 0:
        return x
    check_rotation(size, x.shape[-1], kind=kind)
    return rotate_by(x, hadamard(size, kind, device=x.device, dtype=x.dtype))


def rotate_by(x: Tensor, matrix: Tensor) -> Tensor:
    """Rotates x [..., K] by a given matrix.

    Args:
        x: [..., K]; K must be a multiple of the matrix order.
        matrix: [size, size] from `hadamard`, on the device and in the dtype of x.

    Returns:
        The same bytes as `rotate(x, size)`.
    """
    return (torch.unflatten(x, -1, (-1, matrix.shape[0])) @ matrix).flatten(-2)


def check_rotation(size: int, K: int, what: str = "rotation", *, kind: str = SYLVESTER) -> None:
    """Raises InvalidInput, with the name `what`, unless size is 0 or one of the kind's sizes that divides K."""
    if size and (not is_hadamard_size(size, kind) or K % size):
        power = "two" if kind == SYLVESTER else "four"
        raise InvalidInput(
            f"{what}: Hadamard size {size} for {K} channels; allowed: 0, or a power of {power} that divides {K}"
        )


def is_hadamard_size(size: int, kind: str) -> bool:
    """Whether there is a Hadamard matrix of the kind with this order: a power of two, or of four (the kind regular)."""
    even_power = size.bit_length() % 2 == 1
    return size > 0 and size.bit_count() == 1 and (kind == SYLVESTER or even_power)


def hadamard(
    order: int,
    kind: str = SYLVESTER,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Orthonormal Hadamard matrix [order, order].

    Args:
        order: A power of two; of four if the kind is regular.
        kind: "sylvester" or "regular".
        device: Where the matrix is built; None is torch's default device.
        dtype: The dtype of the result. The values are computed in float32 and rounded once.
    """
    size, negative = _FACTORS[kind]
    H, factor = torch.ones(1, 1, device=device), torch.ones(size, size, device=device)
    for i, j in negative:
        factor[i, j].fill_(-1)  # without a copy from the host
    while H.shape[0] < order:
        H = torch.kron(factor, H)
    return (H / float(order**0.5)).to(dtype)
