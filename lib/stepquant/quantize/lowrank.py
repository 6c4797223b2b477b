"""The low-rank branch of SVDQuant (arXiv 2411.05007, section 4.2): W*s = L + residual, L kept in bfloat16.

The rows of all linears of a site are stacked, so q/k/v get one `down` and a slice of `up` each.

The engines feed the branch with the raw x, while the decomposition lives in the smoothed space, where the layer sees x/s:
(x/s) @ down.T = x @ (down/s).T. So what is stored is proj_down = (down/s).T, and the residual is taken against the
stored, rounded factors: rounding them to bfloat16 then costs nothing.
"""

import torch
from torch import Tensor

from stepquant.errors import UserError

OVERSAMPLING = 10
POWER_ITERATIONS = 4


def low_rank_factors(W: Tensor, rank: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Best approximation of W [N, K] of the given rank: (down [rank, K], up [N, rank]), float32, W ~ up @ down.

    The singular values are shared evenly between the two factors. Rank 0 gives empty factors. The same seed, input and
    thread count give the same bits.

    Raises UserError if the rank is negative or larger than the matrix allows.
    """
    _check_rank(W, rank)
    return _balanced(*_truncated_svd(W.float(), rank, seed))


def weighted_low_rank_factors(W: Tensor, U: Tensor, rank: int, *, seed: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The approximation L = up @ down of W [N, K] that makes tr((W - L) H (W - L).T) smallest, for H^-1 = U^T U.

    U float32 [K, K], upper triangular, as GPTQ factors the (damped) second moments of x: this is the error of x @ L.T on those
    tokens, not that of the weight. With the root C = U^-1 of H = C C^T it is the plain problem for W C (QERA, arXiv 2410.06040).
    start [N, r]: `up` of an approximation that is close already, which spares most of the power iterations. Shapes and errors as in
    `low_rank_factors`.
    """
    _check_rank(W, rank)
    down, up = _balanced(*_truncated_svd(W.float(), rank, seed, U, start))
    return down @ U, up


def stored_branch(down: Tensor, up: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of W*s -> (proj_down [K, r], proj_up [N, r]) in bfloat16, as stored: proj_down eats the raw x."""
    return (down / smooth.float()).T.to(torch.bfloat16).contiguous(), up.to(torch.bfloat16)


def residual(W: Tensor, smooth: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
    """What is left for the 4-bit codes: (W - proj_up @ proj_down.T) * s, float32 [N, K]."""
    return torch.addmm(W.float(), proj_up.float(), proj_down.float().T, alpha=-1).mul_(smooth.float())


def _check_rank(W: Tensor, rank: int) -> None:
    if not 0 <= rank <= min(W.shape):
        raise UserError(f"low-rank branch: rank {rank} for a weight of {W.shape[0]} x {W.shape[1]}; allowed: 0 to {min(W.shape)}")


def _balanced(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """(down, up) with the singular values shared evenly."""
    root = S.sqrt()
    return root[:, None] * Vh, U * root


def _truncated_svd(
    W: Tensor, rank: int, seed: int, U: Tensor | None = None, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Randomized SVD of W, or of W U^-1, with power iterations (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1).

    A full SVD of a 5120 x 5120 matrix takes minutes on a CPU core, this takes seconds; and W U^-1 is only ever applied to thin
    matrices, never formed. Where the sketch would hold a good part of the matrix nothing is saved, and the SVD is exact.
    """
    if 8 * (rank + OVERSAMPLING) >= min(W.shape):
        dense = W if U is None else torch.linalg.solve_triangular(U, W, upper=True, left=False)
        left, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        return left[:, :rank], S[:rank], Vh[:rank]

    def apply(thin: Tensor) -> Tensor:
        return W @ (thin if U is None else torch.linalg.solve_triangular(U, thin, upper=True))

    def apply_transposed(thin: Tensor) -> Tensor:
        return W.T @ thin if U is None else torch.linalg.solve_triangular(U.T, W.T @ thin, upper=False)

    # Drawn on the CPU, so that a GPU sees the same sketch.
    generator = torch.Generator().manual_seed(seed)
    known = 0 if start is None else start.shape[1]
    sketch = apply(torch.randn(W.shape[1], rank + OVERSAMPLING - known, generator=generator).to(W))
    Q = torch.linalg.qr(sketch if start is None else torch.cat([start.float(), sketch], dim=1)).Q
    for _ in range(POWER_ITERATIONS if start is None else 1):
        Q = torch.linalg.qr(apply(torch.linalg.qr(apply_transposed(Q)).Q)).Q
    left, S, Vh = torch.linalg.svd(apply_transposed(Q).T, full_matrices=False)
    return Q @ left[:, :rank], S[:rank], Vh[:rank]
