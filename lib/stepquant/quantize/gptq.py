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


@dataclass(frozen=True)
class InverseFactor:
    """The part of GPTQ that depends on the second moments alone.

    U float32 [K, K] and the order [K] int64 in which columns are visited; the relative damping that was used and how often
    Cholesky failed before; number of dead channels.
    """

    U: Tensor
    order: Tensor
    damping: float
    retries: int
    dead: int


def inverse_factor(H: Tensor, *, damping: float, act_order: bool) -> InverseFactor:
    """U of H [K, K] = X^T X, for any number of calls of `gptq`.

    damping is added to the diagonal of H, relative to its mean over live channels, and multiplied by 10 (at most 6 times)
    while the Cholesky factorization fails. A dead channel (H_ii = 0) is rounded to nearest: calibration says nothing about it.

    Raises UserError if H is not finite, or if no damping makes it positive definite.
    """
    check_finite(H, "GPTQ second moments")
    H, dead = _revive_dead_channels(H.float())
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(H), device=H.device)
    U, damping, retries = _factorize(H[order][:, order], damping)
    return InverseFactor(U, order, damping, retries, int(dead.sum()))


def gptq(W: Tensor, factor: InverseFactor, scales: Scales, fmt: Format, *, block_size: int = 128) -> Tensor:
    """Codes uint8 [N, K] of W [N, K] under static scales that make the error of X @ W.T small.

    W is the residual the codes stand for; computed in float32. block_size only sets how often the columns to the right are
    brought up to date; it changes speed, not the method. Raises UserError if W is not finite.
    """
    check_finite(W, "GPTQ weight")
    U, order = factor.U, factor.order
    columns = W.float().T[order]  # transposed, so that a column of W is contiguous
    steps = Scales(scales.group.T[order // fmt.group], scales.tensor)
    codes = torch.empty_like(columns, dtype=torch.uint8)
    for i1 in range(0, len(columns), block_size):
        i2 = min(i1 + block_size, len(columns))
        block = Scales(steps.group[i1:i2], steps.tensor)
        codes[i1:i2], E = _round_block(columns[i1:i2], U[i1:i2, i1:i2], block, fmt)
        columns[i2:] -= U[i1:i2, i2:].T @ E

    stored = torch.empty_like(codes)
    stored[order] = codes
    return stored.T.contiguous()


def _round_block(columns: Tensor, U: Tensor, scales: Scales, fmt: Format) -> tuple[Tensor, Tensor]:
    """Rounds the B columns of one block in turn, updating the later ones of the block in place.

    columns [B, N], U [B, B], scales.group [B, N] (one scale per element). Gives codes and errors E, both [B, N].
    """
    codes, E = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    for i, w in enumerate(columns):
        scale = Scales(scales.group[i], scales.tensor)
        codes[i] = fmt.encode_each(w, scale)
        E[i] = (w - fmt.decode_each(codes[i], scale)) / U[i, i]
        columns[i + 1 :] -= U[i, i + 1 :, None] * E[i]
    return codes, E


def _revive_dead_channels(H: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of H in which channels that were never active carry the mean second moment, and which those are [K] bool."""
    diagonal = H.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    return H + torch.diag(torch.where(dead, mean, torch.zeros_like(diagonal))), dead


def _factorize(H: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """Upper triangular U with H^-1 = U^T U, the damping used and the number of failed attempts.

    With J the reversal of rows and columns, JHJ = L L^T gives H = R R^T for the upper triangular R = JLJ, hence
    H^-1 = (R^-1)^T R^-1 and U = R^-1: one factorization instead of two, and H^-1 itself is never formed.
    """
    identity = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    mean = H.diagonal().mean()
    for retries in range(RETRIES + 1):
        L, info = torch.linalg.cholesky_ex((H + damping * mean * identity).flip(0, 1))
        if info == 0:
            return torch.linalg.solve_triangular(L.flip(0, 1), identity, upper=True), damping, retries
        damping *= 10
    raise UserError(
        f"GPTQ: second moments are not positive definite even with damping {damping / 10:g} "
        f"({RETRIES} retries); raise gptq.damping or capture more tokens"
    )
