"""The low-rank branch of SVDQuant (arXiv 2411.05007, section 4.2): W*s = L + residual, L kept in bfloat16.

The rows of all linears of a site are stacked, so q/k/v get one `down` and a slice of `up` each.

The engines feed the branch with the raw x, while the decomposition lives in the smoothed space, where the layer sees x/s:
(x/s) @ down.T = x @ (down/s).T. So what is stored is proj_down = (down/s).T, and the residual is taken against the
stored, rounded factors: rounding them to bfloat16 then costs nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stepquant.errors import UserError

OVERSAMPLING = 10
POWER_ITERATIONS = 4
TINY = torch.finfo(torch.float32).tiny


def low_rank_factors(W: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Best approximation of W [N, K] of the given rank: (down [rank, K], up [N, rank]), float32, W ~ up @ down.

    The singular values are shared evenly between the two factors. Rank 0 gives empty factors. The same seed, input and
    thread count give the same bits.

    Raises UserError if the rank is negative or larger than the matrix allows.
    """
    _check_rank(W, rank)
    return _balanced(*_truncated_svd(W.float(), rank, seed))


def weighted_low_rank_factors(
    W: Tensor, times_hessian: Callable[[Tensor], Tensor], rank: int, *, seed: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The approximation L = up @ down of W [N, K] that makes tr((W - L) H (W - L).T) smallest: with H the second moments of x this
    is the error of x @ L.T on those tokens, not that of the weight (QERA, arXiv 2410.06040).

    times_hessian: H @ thin for a thin [K, n], which is all that is asked of the symmetric H. For any `up` with orthonormal columns
    the best `down` is up.T @ W, whatever H, and the best `up` are the leading eigenvectors of W H W.T: a randomized eigenvalue
    problem, without a root of H or its inverse. start [N, r]: `up` of an approximation that is close already, which spares most of
    the power iterations. Shapes and errors as in `low_rank_factors`.
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


def stored_branch(down: Tensor, up: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of W*s -> (proj_down [K, r], proj_up [N, r]) in bfloat16, as stored: proj_down is applied to the raw x."""
    return (down / smooth.float()).T.to(torch.bfloat16).contiguous(), up.to(torch.bfloat16)


def residual(W: Tensor, smooth: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
    """What is left for the 4-bit codes: (W - proj_up @ proj_down.T) * s, float32 [N, K]."""
    return torch.addmm(W.float(), proj_up.float(), proj_down.float().T, alpha=-1).mul_(smooth.float())


def _check_rank(W: Tensor, rank: int) -> None:
    if not 0 <= rank <= min(W.shape):
        raise UserError(
            f"low-rank branch: rank {rank} for a weight of {W.shape[0]} x {W.shape[1]}; allowed: 0 to {min(W.shape)}"
        )


def _balanced(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) with the singular values shared evenly."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def _truncated_svd(W: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomized SVD with power iterations (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1): a full one of a 5120 x 5120 matrix
    takes minutes on a CPU core, this takes seconds."""
    if not _is_worth_sketching(W, rank):
        left, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return left[:, :rank], S[:rank], Vh[:rank]
    Q = torch.linalg.qr(W @ _random(W.shape[1], rank + OVERSAMPLING, seed).to(W)).Q
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    left, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ left[:, :rank], S[:rank], Vh[:rank]


def _is_worth_sketching(W: Tensor, rank: int) -> bool:
    """Where the sketch would hold a good part of the matrix nothing is saved."""
    return 8 * (rank + OVERSAMPLING) < min(W.shape)


def _random(rows: int, columns: int, seed: int) -> Tensor:
    """Drawn on the CPU, so that a GPU sees the same sketch."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
