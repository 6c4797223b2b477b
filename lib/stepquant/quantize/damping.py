"""How far second moments are trusted: their damping, chosen by prompts they do not rest on.

Calibration shows a site some directions of its input and not others, and a direction that it did not show is not one that no prompt
will take: text sites see the words of a few prompts. Weights aimed at rounded inputs (refine.py) give up what H says is
never used, so an H that is taken for more than it knows costs far more there than it does in plain GPTQ. How much H knows follows neither from the
number of tokens nor from that of prompts (eight prompts can use every word there is, or a hundredth of them). So damping, which
gives every direction a share of the mean, is chosen by the output error on validation prompts, as one would choose any regularizer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepquant.quantize.alternate import RoundingProblem, with_damping

VALIDATION_ROWS = 256  # outputs that candidates are compared by: rows are independent, and alike
MIN_IMPROVEMENT = 0.998  # of an error: a candidate has to be better by more than this to be worth the next one's time


def validation_rows(W: Tensor, rank: int) -> Tensor:
    """Which outputs of W [N, K] candidates are compared by, int64: spread evenly, as many as a branch of that rank needs at least."""
    return torch.arange(0, len(W), max(1, len(W) // max(VALIDATION_ROWS, rank)), device=W.device)


def search_damping(
    problem: RoundingProblem, dampings: Sequence[float], error: Callable[[RoundingProblem], float], *, act_order: bool
) -> tuple[RoundingProblem, list[float]]:
    """The problem under the damping of the smallest error, and the errors of the dampings that were tried, in their order.

    problem: under the first of the dampings, which rise. The search goes up and ends where error no longer falls noticeably, so that a
    site which calibration shows well costs one factorization more. Of one candidate nothing is asked: no errors.
    """
    if len(dampings) == 1:
        return problem, []
    errors = [error(problem)]
    for damping in dampings[1:]:
        candidate = with_damping(problem, damping, act_order=act_order)
        errors.append(error(candidate))
        if not errors[-1] < MIN_IMPROVEMENT * errors[-2]:
            break
        problem = candidate
    return problem, errors
