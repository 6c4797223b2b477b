"""The damping that other prompts choose."""

from functools import partial

import pytest
import torch

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


def posed(W, x, damping=DAMPINGS[0]):
    """A layer under the second moments of tokens x, aimed at int4 inputs."""
    transform = InputTransform.smoothing(torch.ones(W.shape[1], dtype=torch.bfloat16))
    return make_problem(
        W, transform, x.T @ x / len(x), rounding_noise([x], transform, scheme("int4")), damping=damping, act_order=True
    )


def error_on(tokens, W):
    """The W4A4 error of a problem's layer, rounded once, on tokens."""
    ones = torch.ones(W.shape[1], dtype=torch.bfloat16)
    up = stored_branch(*low_rank_factors(W, 8, seed=0), ones)[1]

    def error(problem):
        branch = initial_branch(problem, 8, seed=0, start=up)
        layer = rounded_by_gptq(problem, *branch, scheme("int4"), partial(scales_by_error, get_format("int4")))
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
        ([4.0, 5.0, 1.0], 0, 2),  # rises at once: what lies behind is not looked at
        ([4.0, 3.999, 1.0], 0, 2),  # falls by less than 0.2 %
    ],
)
def test_the_search_goes_up_as_long_as_error_falls(layer, errors, chosen, tried):
    by_damping = dict(zip(DAMPINGS, errors))
    found, seen = search_damping(
        posed(*layer), DAMPINGS, lambda problem: by_damping[problem.factor.damping], act_order=True
    )
    assert found.factor.damping == DAMPINGS[chosen]
    assert seen == errors[:tried]


def test_of_one_damping_nothing_is_asked(layer):
    problem = posed(*layer)

    def never(_):
        raise AssertionError("nothing to compare")

    assert search_damping(problem, DAMPINGS[:1], never, act_order=True) == (problem, [])


def test_directions_that_calibration_never_showed_are_kept_in_reserve(layer):
    """Calibration tokens fill half of the directions, validation tokens all. The smallest damping gives up weights there, so that its
    error is more than twice that of the largest, which is chosen; tokens like those of calibration would have chosen the smallest."""
    W, x = layer
    basis = torch.linalg.qr(torch.randn(128, 64, generator=torch.Generator().manual_seed(1))).Q
    seen = (x[:2048] @ basis) @ basis.T
    problem = posed(W, seen)
    chosen, errors = search_damping(problem, DAMPINGS, error_on(x[2048:], W), act_order=True)
    assert chosen.factor.damping == DAMPINGS[-1]
    assert errors[0] > 4 * errors[-1]  # squared
    same, _ = search_damping(problem, DAMPINGS, error_on((x[2048:] @ basis) @ basis.T, W), act_order=True)
    assert same.factor.damping == DAMPINGS[0]


@pytest.mark.parametrize(("rows", "rank", "expected"), [(64, 32, 64), (5120, 32, VALIDATION_ROWS), (5120, 300, 300)])
def test_rows_are_as_many_as_the_branch_needs(rows, rank, expected):
    """Spread evenly: up to one less than twice as many where they do not divide."""
    found = validation_rows(torch.empty(rows, 1), rank)
    assert expected <= len(found) < 2 * expected and found[0] == 0 and found[-1] < rows
    assert len(found.diff().unique()) == 1
