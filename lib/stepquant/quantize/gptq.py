"""GPTQ (arXiv 2210.17323): rounds W column by column and compensates the error in the remaining columns.

In the notation of the paper:

    H      = X^T X, the Hessian of the layer's input (any scale; damping is relative to its mean diagonal)
    U      = the upper triangular factor with H^-1 = U^T U (the paper's Cholesky(H^-1)^T)
    q_i    = quant(w_i)
    E_i    = (w_i - q_i) / U_ii
    w_j   -= E_i U_ij          for the columns j > i

Scales are static: given beforehand, one per group of the stored column order. So with act-order (columns in descending
order of H_ii) the groups stay contiguous in memory and no engine needs a permutation. Rows are independent: the linears
of a site may be stacked and rounded in one call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.errors import UserError
from stepquant.formats import Format, Scales, check_finite

RETRIES = 6
INNER = 16  # columns of a column block that are updated one by one
SMALL_TRIANGLE = 256  # largest triangle that is inverted without halving
PANEL = 1024  # columns of a product with a triangle


@dataclass(frozen=True)
class InverseFactor:
    """The part of GPTQ that depends on the Hessian alone.

    Attributes:
        U: float32 [K, K], columns in the order in which they are rounded.
        order: int64 [K], the stored position of each of these columns.
        damping: The relative damping that was used.
        ridge: The value that damping added to the diagonal.
        retries: How often the Cholesky factorization failed before.
        dead: Number of dead channels (H_ii = 0).
    """

    U: Tensor
    order: Tensor
    damping: float
    ridge: float
    retries: int
    dead: int

    def divide(self, X: Tensor) -> Tensor:
        """X @ H^-1 for X float32 [M, K], columns in stored order, with H damped as it was factored."""
        X, half, quotient = X[:, self.order], torch.empty_like(X), torch.empty_like(X)
        panels = [slice(start, start + PANEL) for start in range(0, len(self.U), PANEL)]
        for panel in panels:  # half = X U^T and half U, without the zeros below the diagonal
            half[:, panel] = X[:, panel.start :] @ self.U[panel, panel.start :].T
        for panel in panels:
            quotient[:, self.order[panel]] = half[:, : panel.stop] @ self.U[: panel.stop, panel]
        return quotient


def inverse_factor(H: Tensor, *, damping: float, act_order: bool, noise: Tensor | None = None) -> InverseFactor:
    """U of a Hessian, for any number of calls of `gptq`.

    A dead channel (H_ii = 0) is rounded to nearest: calibration gives no information about it.

    Args:
        H: The Hessian X^T X, [K, K].
        damping: Added to the diagonal of H, relative to its mean over live channels. It is multiplied by 10, at most 6
            times, while the Cholesky factorization fails.
        act_order: Whether columns are rounded in descending order of H_ii instead of the stored order.
        noise: A variance that is added to the diagonal first, [K] (alternate.py).

    Raises:
        UserError: H is not finite, or no damping makes it positive definite.
    """
    check_finite(H, "GPTQ Hessian")
    diagonal, dead = _revived_diagonal(H.diagonal().float() + (0 if noise is None else noise))
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(H), device=H.device)
    # A copy, so it may be overwritten from here on; at 13,824 columns it takes 0.76 GB.
    ordered = H.float()[order[:, None], order]
    ordered.diagonal().copy_(diagonal[order])
    U, damping, retries = _factorize(ordered, damping)
    return InverseFactor(U, order, damping, damping * diagonal.mean().item(), retries, int(dead.sum()))


def gptq(W: Tensor, factor: InverseFactor, scales: Scales, fmt: Format, *, column_block: int = 128) -> Tensor:
    """Codes of W under static scales that make the error of X @ W.T small.

    Args:
        W: The residual that the codes represent, [N, K]; computed in float32.
        factor: From `inverse_factor`, of the Hessian of X.
        scales: Static scales of W in the stored column order.
        fmt: Format of the codes.
        column_block: Number of columns after which all remaining columns are updated. It changes speed, not the method.

    Returns:
        uint8 [N, K], one code per byte.

    Raises:
        UserError: W is not finite.
    """
    check_finite(W, "GPTQ weight")
    U, order = factor.U, factor.order
    W = W.float() if scales.row is None else W.float() / scales.row[:, None]  # rows are independent
    columns = W.T[order]  # transposed, so that a column of W is contiguous
    K, N = columns.shape
    scale, reciprocal = (each.T.contiguous() for each in fmt.scale_and_reciprocal(scales))
    codes = torch.empty_like(columns, dtype=torch.uint8)
    block = ColumnBlock.allocate(min(column_block, K), N, W.device)
    for start in range(0, K, column_block):
        here, rest = slice(start, min(start + column_block, K)), slice(start + column_block, K)
        if start + column_block > K:
            block = ColumnBlock.allocate(K - start, N, W.device)
        block.load(columns[here], U[here, here], scale, reciprocal, order[here] // fmt.group)
        round_column_block(block, fmt)
        codes[here] = fmt.encode_scaled(block.columns.mul_(block.reciprocal), block.scale)
        if start + column_block < K:
            columns[rest].addmm_(U[here, rest].T, block.errors, alpha=-1)

    stored = torch.empty_like(codes)
    stored[order] = codes
    return stored.T.contiguous()


@dataclass(frozen=True)
class ColumnBlock:
    """The buffers of `round_column_block`, allocated once and used for every block of the same shape.

    Attributes:
        columns: The columns to round, float32 [B, N]; afterwards each holds the values that were rounded.
        U: Their part of the factor, float32 [B, B].
        scale: Scale of every value, float32 [B, N].
        reciprocal: Reciprocal of `scale`, float32 [B, N].
        errors: E of every column, float32 [B, N]; the result.
        rounded: Workspace for one column, float32 [N].
    """

    columns: Tensor
    U: Tensor
    scale: Tensor
    reciprocal: Tensor
    errors: Tensor
    rounded: Tensor

    @classmethod
    def allocate(cls, B: int, N: int, device: torch.device) -> "ColumnBlock":
        """Uninitialized buffers for B columns of N rows."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(empty(B, N), empty(B, B), empty(B, N), empty(B, N), empty(B, N), empty(N))

    def load(self, columns: Tensor, U: Tensor, scale: Tensor, reciprocal: Tensor, group: Tensor) -> None:
        """Copies a block into the buffers.

        Args:
            columns: [B, N].
            U: [B, B].
            scale: Scales of all groups, [K/g, N].
            reciprocal: Their reciprocals, [K/g, N].
            group: Group of each column of the block, int64 [B].
        """
        self.columns.copy_(columns)
        self.U.copy_(U)
        torch.index_select(scale, 0, group, out=self.scale)
        torch.index_select(reciprocal, 0, group, out=self.reciprocal)


def round_column_block(block: ColumnBlock, fmt: Format) -> None:
    """Rounds the columns of a block in order and updates its later columns; writes `columns` and `errors`.

    A column updates the next few columns, and these few together the rest of the block: one matrix product moves less
    memory than many outer products.

    The function accesses the buffers only, reads nothing on the host, and its operations depend on the shape and the
    format alone. So it can be captured once as a CUDA graph and replayed for every block that `load` puts into the same
    buffers. Per column it dispatches 6 operations for int4 and 9 for E2M1, counted without views by
    benchmarks/gptq_launches.py.
    """
    columns, scale, reciprocal = block.columns.unbind(0), block.scale.unbind(0), block.reciprocal.unbind(0)
    errors, rows, diagonal = block.errors.unbind(0), block.U.unbind(0), block.U.diagonal().unbind(0)
    size = len(columns)
    for start in range(0, size, INNER):
        end = min(start + INNER, size)
        for i in range(start, end):
            torch.mul(columns[i], reciprocal[i], out=block.rounded)
            fmt.round_to_grid(block.rounded, scale[i])
            torch.addcmul(columns[i], block.rounded, scale[i], value=-1, out=errors[i])
            errors[i].div_(diagonal[i])
            if i + 1 < end:
                block.columns[i + 1 : end].addr_(rows[i][i + 1 : end], errors[i], alpha=-1)
        if end < size:
            block.columns[end:].addmm_(block.U[start:end, end:].T, block.errors[start:end], alpha=-1)


def _revived_diagonal(diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of H with its mean in place of zeros (channels that were never active), and those channels [K]."""
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones_like(diagonal[0])
    return torch.where(dead, mean, diagonal), dead


def _factorize(H: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """Upper triangular U with H^-1 = U^T U, the damping used and the failed attempts; overwrites H's diagonal.

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
        f"GPTQ: the Hessian is not positive definite even with damping {damping / 10:g} "
        f"({RETRIES} retries); raise gptq.dampings or capture more tokens"
    )


def _inverse_triangle(R: Tensor) -> Tensor:
    """The inverse of an upper triangular R [K, K], by halves: a third of the work of solving against the identity.

    [A B; 0 D]^-1 = [A^-1, -A^-1 B D^-1; 0, D^-1]
    """
    K = len(R)
    if K <= SMALL_TRIANGLE:
        identity = torch.eye(K, dtype=R.dtype, device=R.device)
        small: Tensor = torch.linalg.solve_triangular(R, identity, upper=True)
        return small
    half = K // 2
    inverse = torch.zeros_like(R)
    inverse[:half, :half] = _inverse_triangle(R[:half, :half])
    inverse[half:, half:] = _inverse_triangle(R[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ R[:half, half:]) @ inverse[half:, half:]
    return inverse
