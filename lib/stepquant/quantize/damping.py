"""Hessian damping, selected per site on validation prompts.

Calibration tokens cover only some directions of a site's input, and other prompts may use the others: the tokens of
text sites are the words of a few prompts. Noise-aware weights (alternate.py) are small in directions without energy in
the Hessian, so a Hessian that covers too few directions costs far more there than in plain GPTQ. How many directions
are covered follows neither from the number of tokens nor from the number of prompts. Damping adds a part of the mean
energy to every direction; like any regularizer it is selected by the output error on validation prompts.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepquant.errors import UserError
from stepquant.quantize.alternate import RoundingProblem, with_damping

VALIDATION_ROWS = 256  # outputs on which candidates are compared: rows are independent and alike
MIN_IMPROVEMENT = 0.998  # an error above this part of the one before ends the search


def validation_rows(W: Tensor, rank: int) -> Tensor:
    """The outputs of W [N, K] on which candidates are compared.

    Returns:
        int64 [M], evenly spaced; at least as many as a branch of the given rank needs.
    """
    return torch.arange(0, len(W), max(1, len(W) // max(VALIDATION_ROWS, rank)), device=W.device)


def search_damping(
    problem: RoundingProblem, dampings: Sequence[float], error: Callable[[RoundingProblem], float], *, act_order: bool
) -> tuple[RoundingProblem, list[float]]:
    """Selects the damping with the smallest error.

    The search tries the dampings in order and ends where the error no longer falls noticeably, so a site that
    calibration covers well needs only one more factorization. A single damping is taken without an error.

    Args:
        problem: The problem under the first of the dampings.
        dampings: Candidates in ascending order.
        error: Gives the validation error of a problem; an error that is not finite counts as infinite.
        act_order: As in `inverse_factor`.

    Returns:
        The problem under the selected damping, and the errors of the dampings that were tried.

    Raises:
        UserError: No damping has a finite error.
    """
    if len(dampings) == 1:
        return problem, []
    errors = [_finite_or_infinite(error(problem))]
    best = errors[0]
    for damping in dampings[1:]:
        candidate = with_damping(problem, damping, act_order=act_order)
        errors.append(_finite_or_infinite(error(candidate)))
        if errors[-1] < MIN_IMPROVEMENT * best:
            problem, best = candidate, errors[-1]
        elif best < math.inf:
            break
    if best == math.inf:
        raise UserError(
            f"damping search: none of gptq.dampings {list(dampings)} has a finite output error on the validation "
            "tokens, so they hold NaN or infinity, or the site's output is zero; check the source model's weights, "
            "and run stage capture again"
        )
    return problem, errors


def _finite_or_infinite(error: float) -> float:
    """NaN as infinity: a comparison with NaN is always false, so it would never be replaced."""
    return error if math.isfinite(error) else math.inf
