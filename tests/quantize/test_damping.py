"""Hessian damping, selected on tokens of other prompts."""

import math
from functools import partial

import pytest
import torch

from stepquant.errors import UserError
from stepquant.formats import get_format
from stepquant.quantize.alternate import initial_branch, make_problem, rounded_by_gptq
from stepquant.quantize.clip import UNCLIPPED, clip_errors
from stepquant.quantize.damping import VALIDATION_ROWS, search_damping, validation_rows
from stepquant.quantize.lowrank import low_rank_factors, stored_branch
from stepquant.quantize.quantized_layer import rounding_noise
from stepquant.quantize.transform import InputTransform
from stepquant.quantize.weight_scales import scales_by_error
from tests.quantize.scheme import scheme

DAMPINGS = [0.0003, 0.005, 0.1]


def problem_of(W, x, damping=DAMPINGS[0]):
    """The rounding problem of W under the Hessian of tokens x and the noise of int4 inputs."""
    transform = InputTransform.smoothing(torch.ones(W.shape[1], dtype=torch.bfloat16))
    return make_problem(
        W, transform, x.T @ x / len(x), rounding_noise([x], transform, scheme("int4")), damping=damping, act_order=True
    )


def error_on(tokens, W):
    """The W4A4 error of a problem's layer, rounded once, on tokens."""
    ones = torch.ones(W.shape[1], dtype=torch.bfloat16)
    searched = stored_branch(*low_rank_factors(W, 8, seed=0), ones)

    def error(problem):
        branch = initial_branch(problem, searched, seed=0)
        layer = rounded_by_gptq(problem, branch, scheme("int4"), partial(scales_by_error, get_format("int4")))
        return clip_errors([tokens], W, layer, [UNCLIPPED]).square().item()

    return error


@pytest.fixture
def layer(make_layer):
    return make_layer(seed=5, rows=64, channels=128, tokens=4096)


@pytest.mark.parametrize(
    ("errors", "chosen", "tried"),
    [
        ([4.0, 2.0, 1.0], 2, 3),  # falls to the end
        ([4.0, 2.0, 3.0], 1, 3),  # turns
        ([4.0, 5.0, 1.0], 0, 2),  # rises at once: the last damping is not tried
        ([4.0, 3.999, 1.0], 0, 2),  # falls by less than 0.2 %
        ([torch.nan, 2.0, 1.0], 2, 3),  # an error that is not finite is never the smallest
        ([torch.nan, torch.inf, 1.0], 2, 3),
        ([2.0, torch.nan, 1.0], 0, 2),
    ],
)
def test_the_search_raises_the_damping_while_the_error_falls(layer, errors, chosen, tried):
    by_damping = dict(zip(DAMPINGS, errors))
    found, returned = search_damping(
        problem_of(*layer), DAMPINGS, lambda problem: by_damping[problem.factor.damping], act_order=True
    )
    assert found.factor.damping == DAMPINGS[chosen]
    assert returned == [e if math.isfinite(e) else math.inf for e in errors[:tried]]


def test_a_single_damping_needs_no_error(layer):
    problem = problem_of(*layer)

    def never(_):
        raise AssertionError("nothing to compare")

    assert search_damping(problem, DAMPINGS[:1], never, act_order=True) == (problem, [])


def test_tokens_in_directions_without_calibration_select_a_large_damping(layer):
    """Calibration tokens cover half of the directions, validation tokens all of them.

    With the smallest damping the weights of the other directions are small, so its error is more than twice that of the
    largest damping, which is selected. Validation tokens like those of calibration select the smallest.
    """
    W, x = layer
    basis = torch.linalg.qr(torch.randn(128, 64, generator=torch.Generator().manual_seed(1))).Q
    calibration = (x[:2048] @ basis) @ basis.T
    problem = problem_of(W, calibration)
    chosen, errors = search_damping(problem, DAMPINGS, error_on(x[2048:], W), act_order=True)
    assert chosen.factor.damping == DAMPINGS[-1]
    assert errors[0] > 4 * errors[-1]  # squared
    same, _ = search_damping(problem, DAMPINGS, error_on((x[2048:] @ basis) @ basis.T, W), act_order=True)
    assert same.factor.damping == DAMPINGS[0]


def test_a_search_without_a_finite_error_is_refused(layer):
    with pytest.raises(UserError, match="gptq.dampings.*has a finite output error"):
        search_damping(problem_of(*layer), DAMPINGS, lambda _: torch.nan, act_order=True)


@pytest.mark.parametrize(("rows", "rank", "expected"), [(64, 32, 64), (5120, 32, VALIDATION_ROWS), (5120, 300, 300)])
def test_there_are_as_many_rows_as_the_branch_needs(rows, rank, expected):
    """Evenly spaced: less than twice as many where the number does not divide."""
    found = validation_rows(torch.empty(rows, 1), rank)
    assert expected <= len(found) < 2 * expected and found[0] == 0 and found[-1] < rows
    assert len(found.diff().unique()) == 1
