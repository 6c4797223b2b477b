"""GPTQ of what a branch left, and the branch refitted to what GPTQ lost, on held-out tokens."""

from functools import partial

import pytest
import torch

from stepquant.formats import get_format
from stepquant.quantize.gptq import gptq, inverse_factor
from stepquant.quantize.layer import LayerFactors, Precision, layer_output, relative_error
from stepquant.quantize.lowrank import low_rank_factors, residual, stored_branch, weighted_low_rank_factors
from stepquant.quantize.refine import refit_branch, rounded_by_gptq
from stepquant.quantize.scales import scales_by_error
from stepquant.quantize.smooth import smoothing_factor
from stepquant.quantize.transform import InputTransform

FORMATS = ["int4", "mxfp4", "nvfp4"]


@pytest.fixture
def case(make_layer):
    """W, calibration tokens, their mean second moments, smoothing, held-out tokens and the output there."""
    W, x = make_layer(seed=3, rows=64, channels=128, tokens=5120)
    train, held_out = x[:4096], x[4096:]
    H = train.T @ train / len(train)
    smooth = smoothing_factor(H.diagonal().sqrt(), W.abs().amax(0), alpha=0.7, beta=0.3)
    return W, train, H, smooth, held_out, held_out @ W.T


def upper_factor(H):
    """U of H^-1 = U^T U."""
    return torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True).float()


def test_weighted_fit_against_a_generalized_eigenproblem(case):
    """The best L of rank r keeps the r leading eigenvectors of W H W^T: tr of the rest is the squared error."""
    W, _, H, *_ = case
    down, up = weighted_low_rank_factors(W, upper_factor(H), 8, seed=0)
    E = (W - up @ down).double()
    eigenvalues = torch.linalg.eigvalsh(W.double() @ H.double() @ W.double().T)
    assert torch.trace(E @ H.double() @ E.T).item() == pytest.approx(eigenvalues[:-8].sum().item(), rel=1e-3)


def test_weighted_fit_with_identity_is_the_plain_one(case):
    W = case[0]
    down, up = weighted_low_rank_factors(W, torch.eye(128), 8, seed=0)
    plain_down, plain_up = low_rank_factors(W, 8, seed=0)
    torch.testing.assert_close(up @ down, plain_up @ plain_down, rtol=0, atol=1e-5)


def rounded(W, H, transform, branch, name) -> LayerFactors:
    fmt = get_format(name)
    factor = inverse_factor(transform.moments(H), damping=0.01, act_order=True)
    return rounded_by_gptq(W, transform, *branch, factor, Precision(fmt, "ceil", None, "ceil"), partial(scales_by_error, fmt))


def branch_of(W, smooth):
    return stored_branch(*low_rank_factors(W * smooth.float(), 8, seed=0), smooth)


def test_weighted_fit_never_forms_the_product(make_layer):
    """Wide enough for the randomized SVD: it keeps what the exact one keeps, of W times a root of H."""
    W, x = make_layer(seed=4, rows=192, channels=256, tokens=1024)
    H = x.T @ x / len(x)
    down, up = weighted_low_rank_factors(W, upper_factor(H), 8, seed=0)
    root = torch.linalg.cholesky(H.double())
    left = torch.linalg.norm((W - up @ down).double() @ root)
    best = torch.linalg.norm(torch.linalg.svdvals(W.double() @ root)[8:])
    assert best <= left < 1.001 * best


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_gptq_of_the_residual(case, name):
    W, _, H, smooth, *_ = case
    factors = rounded(W, H, InputTransform.smoothing(smooth), branch_of(W, smooth), name)
    s, fmt = smooth.float(), get_format(name)
    R = residual(W, smooth, *branch_of(W, smooth))
    factor = inverse_factor(H / s[:, None] / s, damping=0.01, act_order=True)
    assert torch.equal(factors.codes, gptq(R, factor, scales_by_error(fmt, R), fmt))


@pytest.mark.parametrize(("name", "rotation"), [("int4", 0), ("int4", 64), ("mxfp4", 32), ("nvfp4", 0)])
def test_refitting_lowers_the_held_out_error(case, name, rotation):
    W, train, _, smooth, held_out, reference = case
    mean = train.mean(0).bfloat16()
    H = (train - mean.float()).T @ (train - mean.float()) / len(train)
    transform = InputTransform(smooth, mean, rotation)
    before = rounded(W, H, transform, branch_of(W, smooth), name)
    factor = inverse_factor(transform.moments(H), damping=0.01, act_order=True)
    after = refit_branch(W, before, factor, seed=0)
    again = refit_branch(W, rounded(W, H, transform, (after.proj_down, after.proj_up), name), factor, seed=0)
    errors = [relative_error(layer_output(held_out, layer, 1.0, 0), reference).item() for layer in (before, after, again)]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(after.codes, before.codes)


def test_a_full_rank_refit_leaves_no_error(case):
    """With rank = full width the branch makes up for any codes, up to its own bfloat16."""
    W, _, H, smooth, held_out, reference = case
    branch = stored_branch(*low_rank_factors(W * smooth.float(), 64, seed=0), smooth)
    layer = rounded(W, H, InputTransform.smoothing(smooth), branch, "nvfp4")
    factor = inverse_factor(layer.transform.moments(H), damping=0.01, act_order=True)
    refitted = refit_branch(W, layer, factor, seed=0)
    assert relative_error(layer_output(held_out, refitted, 1.0, 0), reference) < 0.01
