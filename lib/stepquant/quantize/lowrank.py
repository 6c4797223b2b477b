"""The low-rank branch of SVDQuant (arXiv 2411.05007, section 4.2): W*s = L + residual, L stored in bfloat16.

The rows of all linears of a site are stacked, so q/k/v have one `down` in common and a slice of `up` each.

Engines apply the branch to the raw x, while the decomposition is that of the smoothed weight, whose input is x/s:
(x/s) @ down.T = x @ (down/s).T. So proj_down = (down/s).T is stored. The residual is computed with the stored, rounded
factors, so their rounding to bfloat16 adds no error.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stepquant.errors import UserError

OVERSAMPLING = 10
POWER_ITERATIONS = 4
TINY = torch.finfo(torch.float32).tiny

Branch = tuple[Tensor, Tensor]  # proj_down [K, r] and proj_up [N, r], bfloat16 as stored


def low_rank_factors(W: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """The best approximation W ~ up @ down of a given rank.

    The same seed, input and thread count give the same bits.

    Args:
        W: [N, K] of any float dtype.
        rank: Rank of the approximation; 0 gives empty factors.
        seed: Seed of the sketch.

    Returns:
        (down [rank, K], up [N, rank]), float32; each has the square roots of the singular values as a factor.

    Raises:
        UserError: The rank is negative or larger than the matrix allows.
    """
    _check_rank(W, rank)
    return _balanced(*_truncated_svd(W.float(), rank, seed))


def weighted_low_rank_factors(
    W: Tensor, times_hessian: Callable[[Tensor], Tensor], rank: int, *, seed: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The approximation L = up @ down of W that minimizes tr((W - L) H (W - L).T).

    With the Hessian H of x this is the error of x @ L.T on those tokens instead of the error of the weight (QERA,
    arXiv 2410.06040). For any `up` with orthonormal columns the best `down` is up.T @ W, whatever H is, and the best
    `up` holds the leading eigenvectors of W H W.T. This is a randomized eigenvalue problem, which needs neither a root
    nor the inverse of H.

    Args:
        W: [N, K] of any float dtype.
        times_hessian: Gives H @ thin for a thin [K, n]; H is symmetric.
        rank: Rank of the approximation.
        seed: Seed of the sketch.
        start: [N, r], `up` of an approximation that is close already; it saves most of the power iterations.

    Returns:
        As `low_rank_factors`.

    Raises:
        UserError: As `low_rank_factors`.
    """
    _check_rank(W, rank)
    W, known = W.float(), 0 if start is None else start.shape[1]
    width = rank + OVERSAMPLING if _is_worth_sketching(W, rank) else min(W.shape)
    sketch = W @ times_hessian(_random(W.shape[1], max(width - known, 0), seed).to(W))
    Q = torch.linalg.qr(sketch if start is None else torch.cat([start.float(), sketch], dim=1)).Q
    for _ in range(POWER_ITERATIONS if start is None else 1):
        Q = torch.linalg.qr(W @ times_hessian(W.T @ Q)).Q
    projected = Q.T @ W
    vectors = torch.linalg.eigh(projected @ times_hessian(projected.T)).eigenvectors
    leading = vectors[:, len(vectors) - rank :].flip(1)
    up, down = Q @ leading, leading.T @ projected
    root = torch.linalg.vector_norm(down, dim=1).sqrt()
    return down / root.clamp(min=TINY)[:, None], up * root


def stored_branch(down: Tensor, up: Tensor, smooth: Tensor) -> Branch:
    """The branch in the form that is stored and used.

    Args:
        down: [r, K], factor of W*s.
        up: [N, r], factor of W*s.
        smooth: [K], the smoothing factor s.

    Returns:
        (proj_down [K, r], proj_up [N, r]), bfloat16; proj_down is applied to the raw input.
    """
    return (down / smooth.float()).T.to(torch.bfloat16).contiguous(), up.to(torch.bfloat16)


def residual(W: Tensor, smooth: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
    """The part of W that the 4-bit codes represent: (W - proj_up @ proj_down.T) * s, float32 [N, K]."""
    return torch.addmm(W.float(), proj_up.float(), proj_down.float().T, alpha=-1).mul_(smooth.float())


def _check_rank(W: Tensor, rank: int) -> None:
    if not 0 <= rank <= min(W.shape):
        raise UserError(
            f"low-rank branch: rank {rank} for a weight of {W.shape[0]} x {W.shape[1]}; allowed: 0 to {min(W.shape)}"
        )


def _balanced(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up), each with the square roots of the singular values."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def _truncated_svd(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomized SVD with power iterations (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1).

    A full SVD of a 5120 x 5120 matrix takes minutes on one CPU core, this takes seconds. At that size a full SVD is
    only used for a rank above 629, far above any useful one.
    """
    if not _is_worth_sketching(W, rank):
        left, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return left[:, :rank], S[:rank], Vh[:rank]
    Q = torch.linalg.qr(W @ _random(W.shape[1], rank + OVERSAMPLING, seed).to(W)).Q
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    # eigh of the (rank + 10)-wide Gram matrix is about ten times faster (0.7 against 6.6 ms for 42 x 5120), but changes
    # the last bit of 2 to 12 % of the bfloat16 factors. This line is one of nine products and QRs of a candidate.
    left, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ left[:, :rank], S[:rank], Vh[:rank]


def _is_worth_sketching(W: Tensor, rank: int) -> bool:
    """False where the sketch would be a large part of the matrix and save nothing."""
    return 8 * (rank + OVERSAMPLING) < min(W.shape)


def _random(rows: int, columns: int, seed: int) -> Tensor:
    """A normal matrix, drawn on the CPU so that every device uses the same sketch."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
