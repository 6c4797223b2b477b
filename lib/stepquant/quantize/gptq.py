"""GPTQ (arXiv 2210.17323) in the notation of the paper: rounds W column by column, later columns make up for it.

    H      = X^T X, second moments of what the layer sees (any scale; damping is relative to their mean)
    U      = the upper triangular factor with H^-1 = U^T U (the paper's Cholesky(H^-1)^T)
    q_i    = quant(w_i)
    E_i    = (w_i - q_i) / U_ii
    w_j   -= E_i U_ij          for the columns j > i

Scales are static: given beforehand, one per group of the stored column order, so that with act-order (columns visited by
falling H_ii) the groups stay contiguous in memory and no engine needs a permutation. Rows are independent: the linears of a
site may be stacked and done in one call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.errors import UserError
from stepquant.formats import Format, Scales, check_finite

RETRIES = 6
INNER = 16  # columns of a block that are brought up to date one by one
SMALL_TRIANGLE = 256  # up to which a triangle is inverted at once
PANEL = 1024  # columns of a product with a triangle


@dataclass(frozen=True)
class InverseFactor:
    """The part of GPTQ that depends on the second moments alone.

    U float32 [K, K] and the order [K] int64 in which columns are visited; the relative damping that was used, what it added to the
    diagonal (ridge), and how often Cholesky failed before; number of dead channels.
    """

    U: Tensor
    order: Tensor
    damping: float
    ridge: float
    retries: int
    dead: int

    def divide(self, X: Tensor) -> Tensor:
        """X @ H^-1 for X float32 [M, K]: columns in stored order, H damped as it was factored."""
        X, half, quotient = X[:, self.order], torch.empty_like(X), torch.empty_like(X)
        panels = [slice(start, start + PANEL) for start in range(0, len(self.U), PANEL)]
        for panel in panels:  # half = X U^T and half U, without the zeros below the diagonal
            half[:, panel] = X[:, panel.start :] @ self.U[panel, panel.start :].T
        for panel in panels:
            quotient[:, self.order[panel]] = half[:, : panel.stop] @ self.U[: panel.stop, panel]
        return quotient


def inverse_factor(H: Tensor, *, damping: float, act_order: bool, noise: Tensor | None = None) -> InverseFactor:
    """U of H [K, K] = X^T X, for any number of calls of `gptq`.

    noise [K]: a variance to add to the diagonal first (refine.py).

    damping is added to the diagonal of H, relative to its mean over live channels, and multiplied by 10 (at most 6 times)
    while the Cholesky factorization fails. A dead channel (H_ii = 0) is rounded to nearest: calibration says nothing about it.

    Raises UserError if H is not finite, or if no damping makes it positive definite.
    """
    check_finite(H, "GPTQ second moments")
    diagonal, dead = _revived_diagonal(H.diagonal().float() + (0 if noise is None else noise))
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(H), device=H.device)
    ordered = H.float()[
        order[:, None], order
    ]  # a copy, which is worked on in place from here: at 13,824 columns it is 0.76 GB
    ordered.diagonal().copy_(diagonal[order])
    U, damping, retries = _factorize(ordered, damping)
    return InverseFactor(U, order, damping, damping * diagonal.mean().item(), retries, int(dead.sum()))


def gptq(W: Tensor, factor: InverseFactor, scales: Scales, fmt: Format, *, column_block: int = 128) -> Tensor:
    """Codes uint8 [N, K] of W [N, K] under static scales that make the error of X @ W.T small.

    W is the residual the codes stand for; computed in float32. column_block only sets how often the columns to the right are
    brought up to date; it changes speed, not the method. Raises UserError if W is not finite.
    """
    check_finite(W, "GPTQ weight")
    U, order = factor.U, factor.order
    columns = W.float().T[order]  # transposed, so that a column of W is contiguous
    step, inverse = (unit.T for unit in fmt.scale_and_reciprocal(scales))
    codes = torch.empty_like(columns, dtype=torch.uint8)
    for i1 in range(0, len(columns), column_block):
        i2 = min(i1 + column_block, len(columns))
        group = order[i1:i2] // fmt.group
        Y, E = _round_block(columns[i1:i2], U[i1:i2, i1:i2], step[group], inverse[group], fmt)
        codes[i1:i2] = fmt.encode_scaled(Y)
        columns[i2:].addmm_(U[i1:i2, i2:].T, E, alpha=-1)

    stored = torch.empty_like(codes)
    stored[order] = codes
    return stored.T.contiguous()


def _round_block(columns: Tensor, U: Tensor, step: Tensor, inverse: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Rounds the B columns of one block in turn, updating the later ones of the block in place.

    columns [B, N], U [B, B], step and inverse [B, N]: the unit of every value. Gives what was rounded, in these units, and the errors
    E, both [B, N]. A column brings the next few up to date, these few together the rest of the block: one matrix product moves
    less memory than many outer ones.
    """
    Y, E = torch.empty_like(columns), torch.empty_like(columns)
    for start in range(0, len(columns), INNER):
        end = min(start + INNER, len(columns))
        for i in range(start, end):
            Y[i] = y = columns[i] * inverse[i]
            E[i] = torch.addcmul(columns[i], fmt.round_to_grid(y), step[i], value=-1) / U[i, i]
            columns[i + 1 : end].addr_(U[i, i + 1 : end], E[i], alpha=-1)
        columns[end:].addmm_(U[start:end, end:].T, E[start:end], alpha=-1)
    return Y, E


def _revived_diagonal(diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of H with the mean in place of the zeros of channels that were never active, and which those are [K] bool."""
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    return torch.where(dead, mean, diagonal), dead


def _factorize(H: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """Upper triangular U with H^-1 = U^T U, the damping used and the number of failed attempts; H's diagonal is overwritten.

    With J the reversal of rows and columns, JHJ = L L^T gives H = R R^T for the upper triangular R = JLJ, hence
    H^-1 = (R^-1)^T R^-1 and U = R^-1: one factorization instead of two, and H^-1 itself is never formed.
    """
    diagonal = H.diagonal().clone()
    for retries in range(RETRIES + 1):
        H.diagonal().copy_(diagonal + damping * diagonal.mean())
        L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
        if info == 0:
            return _inverse_triangle(L.flip(0, 1)), damping, retries
        damping *= 10
    raise UserError(
        f"GPTQ: second moments are not positive definite even with damping {damping / 10:g} "
        f"({RETRIES} retries); raise gptq.dampings or capture more tokens"
    )


def _inverse_triangle(R: Tensor) -> Tensor:
    """The inverse of an upper triangular R [K, K], by halves: a third of the work of solving against the identity.

    [A B; 0 D]^-1 = [A^-1, -A^-1 B D^-1; 0, D^-1]
    """
    K = len(R)
    if K <= SMALL_TRIANGLE:
        return torch.linalg.solve_triangular(R, torch.eye(K, dtype=R.dtype, device=R.device), upper=True)
    half = K // 2
    inverse = torch.zeros_like(R)
    inverse[:half, :half], inverse[half:, half:] = (
        _inverse_triangle(R[:half, :half]),
        _inverse_triangle(R[half:, half:]),
    )
    inverse[:half, half:] = -(inverse[:half, :half] @ R[:half, half:]) @ inverse[half:, half:]
    return inverse
