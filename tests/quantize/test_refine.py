"""Refitting the branch, learned smoothing and the rotated layer, on held-out tokens."""

import pytest
import torch

from stepquant.errors import UserError
from stepquant.formats import get_format
from stepquant.quantize.gptq import gptq
from stepquant.quantize.layer import Precision, layer_output, relative_error
from stepquant.quantize.learn import learn_smoothing
from stepquant.quantize.lowrank import low_rank_factors, residual, stored_branch, weighted_low_rank_factors
from stepquant.quantize.refine import refine
from stepquant.quantize.scales import scales_by_error
from stepquant.quantize.smooth import nearest_factors, smoothing_factor

FORMATS = ["int4", "mxfp4", "nvfp4"]


def precision(name: str) -> Precision:
    fmt = get_format(name)
    return Precision(weight=fmt, weight_rounding="ceil", activation=fmt, activation_rounding="ceil")


@pytest.fixture
def case(make_layer):
    """W, calibration tokens, their mean second moments, smoothing, held-out tokens and the output there."""
    W, x = make_layer(seed=3, rows=64, channels=128, tokens=5120)
    train, held_out = x[:4096], x[4096:]
    H = train.T @ train / len(train)
    smooth = smoothing_factor(H.diagonal().sqrt(), W.abs().amax(0), alpha=0.7, beta=0.3)
    return W, train, H, smooth, held_out, held_out @ W.T


def test_weighted_fit_against_a_generalized_eigenproblem(case):
    """The best L of rank r keeps the r leading eigenvectors of W H W^T: tr of the rest is the squared error."""
    W, _, H, *_ = case
    down, up = weighted_low_rank_factors(W, H, 8, seed=0)
    E = (W - up @ down).double()
    eigenvalues = torch.linalg.eigvalsh(W.double() @ H.double() @ W.double().T)
    assert torch.trace(E @ H.double() @ E.T).item() == pytest.approx(eigenvalues[:-8].sum().item(), rel=1e-3)


def test_weighted_fit_with_identity_is_the_plain_one(case):
    W = case[0]
    down, up = weighted_low_rank_factors(W, torch.eye(128), 8, seed=0)
    plain_down, plain_up = low_rank_factors(W, 8, seed=0)
    torch.testing.assert_close(up @ down, plain_up @ plain_down, rtol=0, atol=1e-5)


def test_weighted_fit_refuses_what_are_no_second_moments(case):
    with pytest.raises(UserError, match="not positive definite"):
        weighted_low_rank_factors(case[0], -torch.eye(128), 8, seed=0)


@pytest.mark.parametrize("name", FORMATS)
def test_no_rounds_is_gptq_of_the_residual(case, name):
    W, _, H, smooth, *_ = case
    factors = refine(W, H, smooth, rank=8, rounds=0, damping=0.01, seed=0, precision=precision(name), rotation=0)
    s, fmt = smooth.float(), get_format(name)
    R = residual(W, smooth, *stored_branch(*low_rank_factors(W * s, 8, seed=0), smooth))
    result = gptq(R, H / s[:, None] / s, scales_by_error(fmt, R), fmt, damping=0.01, act_order=True)
    assert torch.equal(factors.codes, result.codes)


@pytest.mark.parametrize(("name", "rotation"), [("int4", 0), ("int4", 64), ("mxfp4", 32), ("nvfp4", 0)])
def test_refitting_lowers_the_held_out_weight_error(case, name, rotation):
    W, _, H, smooth, held_out, reference = case
    weight_only = Precision(get_format(name), "ceil", None, "ceil")

    def error(rounds: int) -> float:
        factors = refine(W, H, smooth, rank=8, rounds=rounds, damping=0.01, seed=0, precision=weight_only, rotation=rotation)
        return relative_error(layer_output(held_out, factors, 1.0, 0), reference).item()

    assert error(3) < 0.98 * error(0)


@pytest.mark.parametrize("rotation", [32, 128])
def test_full_rank_layer_survives_rotation(case, rotation):
    W, *_, smooth, held_out, reference = case
    factors = nearest_factors(W, smooth, rank=64, seed=0, precision=precision("nvfp4"), rotation=rotation)
    assert relative_error(layer_output(held_out, factors, 1.0, 0), reference) < 0.003


def test_rotation_pays_for_int4(case):
    W, *_, smooth, held_out, reference = case
    plain, rotated = (
        nearest_factors(W, smooth, rank=8, seed=0, precision=precision("int4"), rotation=block) for block in (0, 64)
    )
    errors = [relative_error(layer_output(held_out, factors, 1.0, 0), reference) for factors in (plain, rotated)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(("name", "rotation"), [("int4", 0), ("int4", 64), ("mxfp4", 32), ("nvfp4", 0)])
def test_learned_smoothing_lowers_the_held_out_error(case, name, rotation):
    W, train, _, smooth, held_out, reference = case
    learned = learn_smoothing(W, train, smooth, steps=30, rank=8, seed=0, precision=precision(name), rotation=rotation)
    assert learned.dtype == torch.bfloat16 and (learned > 0).all()

    def error(s: torch.Tensor) -> float:
        factors = nearest_factors(W, s, rank=8, seed=0, precision=precision(name), rotation=rotation)
        return relative_error(layer_output(held_out, factors, 1.0, 0), reference).item()

    assert error(learned) < error(smooth)


def test_no_steps_learn_nothing(case):
    W, train, _, smooth, *_ = case
    learned = learn_smoothing(W, train, smooth, steps=0, rank=8, seed=0, precision=precision("int4"), rotation=0)
    torch.testing.assert_close(learned, smooth, rtol=2**-7, atol=0)
