"""GPTQ of the residual, and the branch refitted to its rounding error, on held-out tokens."""

from functools import partial

import pytest
import torch

from stepquant.formats import get_format
from stepquant.quantize.alternate import (
    initial_branch,
    make_problem,
    refit_branch,
    rounded_by_gptq,
    select_rows,
    with_damping,
)
from stepquant.quantize.gptq import gptq, inverse_factor
from stepquant.quantize.lowrank import low_rank_factors, stored_branch, weighted_low_rank_factors
from stepquant.quantize.quantized_layer import (
    QuantizedLayer,
    QuantScheme,
    dequantized_weight,
    layer_output,
    relative_error,
    rounding_noise,
)
from stepquant.quantize.smooth import smoothing_factor
from stepquant.quantize.transform import InputTransform
from stepquant.quantize.weight_scales import scales_by_error

FORMATS = ["int4", "mxfp4", "nvfp4"]


@pytest.fixture
def case(make_layer):
    """W, calibration tokens, their Hessian, smoothing, held-out tokens and the output there."""
    W, x = make_layer(seed=3, rows=64, channels=128, tokens=5120)
    train, held_out = x[:4096], x[4096:]
    H = train.T @ train / len(train)
    smooth = smoothing_factor(H.diagonal().sqrt(), W.abs().amax(0), alpha=0.7, beta=0.3)
    return W, train, H, smooth, held_out, held_out @ W.T


def test_weighted_fit_against_a_generalized_eigenproblem(case):
    """The best L of rank r keeps the r leading eigenvectors of W H W^T: tr of the rest is the squared error."""
    W, _, H, *_ = case
    down, up = weighted_low_rank_factors(W, H.matmul, 8, seed=0)
    E = (W - up @ down).double()
    eigenvalues = torch.linalg.eigvalsh(W.double() @ H.double() @ W.double().T)
    assert torch.trace(E @ H.double() @ E.T).item() == pytest.approx(eigenvalues[:-8].sum().item(), rel=1e-3)


def test_weighted_fit_with_identity_is_the_plain_one(case):
    W = case[0]
    down, up = weighted_low_rank_factors(W, torch.eye(128).matmul, 8, seed=0)
    plain_down, plain_up = low_rank_factors(W, 8, seed=0)
    torch.testing.assert_close(up @ down, plain_up @ plain_down, rtol=0, atol=1e-5)


def problem_of(W, H, transform, noise=None):
    return make_problem(W, transform, transform.hessian(H), noise, damping=0.01, act_order=True)


def rounded(problem, branch, name, activation=None) -> QuantizedLayer:
    fmt = get_format(name)
    scheme = QuantScheme(fmt, "ceil", activation and get_format(activation), "ceil", "absmax")
    return rounded_by_gptq(problem, branch, scheme, partial(scales_by_error, fmt))


def branch_of(W, smooth):
    return stored_branch(*low_rank_factors(W * smooth.float(), 8, seed=0), smooth)


def test_weighted_fit_by_sketch(make_layer):
    """Wide enough to be randomized: it approximates W times a root of H as well as the exact one."""
    W, x = make_layer(seed=4, rows=192, channels=256, tokens=1024)
    H = x.T @ x / len(x)
    down, up = weighted_low_rank_factors(W, H.matmul, 8, seed=0)
    root = torch.linalg.cholesky(H.double())
    left = torch.linalg.norm((W - up @ down).double() @ root)
    best = torch.linalg.norm(torch.linalg.svdvals(W.double() @ root)[8:])
    assert best <= left < 1.001 * best


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_gptq_of_the_residual(case, name):
    W, _, H, smooth, *_ = case
    factors = rounded(problem_of(W, H, InputTransform.smoothing(smooth)), branch_of(W, smooth), name)
    s, fmt = smooth.float(), get_format(name)
    down, up = branch_of(W, smooth)
    R = torch.addmm(W * s, up.float(), down.float().T * s, alpha=-1)
    factor = inverse_factor(H / s[:, None] / s, damping=0.01, act_order=True)
    assert torch.equal(factors.codes, gptq(R, factor, scales_by_error(fmt, R), fmt))


@pytest.mark.parametrize(("name", "rotation"), [("int4", 0), ("int4", 64), ("mxfp4", 32), ("nvfp4", 0)])
def test_refitting_lowers_the_held_out_error(case, name, rotation):
    W, train, _, smooth, held_out, reference = case
    mean = train.mean(0).bfloat16()
    H = (train - mean.float()).T @ (train - mean.float()) / len(train)
    problem = problem_of(W, H, InputTransform(smooth, mean, rotation))
    before = rounded(problem, branch_of(W, smooth), name)
    after = refit_branch(problem, before, seed=0)
    again = refit_branch(problem, rounded(problem, (after.proj_down, after.proj_up), name), seed=0)
    errors = [
        relative_error(layer_output(held_out, layer, 1.0, 0), reference).item() for layer in (before, after, again)
    ]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(after.codes, before.codes)


def test_a_full_rank_refit_leaves_no_error(case):
    """With rank = full width the branch compensates any codes, up to its own rounding to bfloat16."""
    W, _, H, smooth, held_out, reference = case
    branch = stored_branch(*low_rank_factors(W * smooth.float(), 64, seed=0), smooth)
    problem = problem_of(W, H, InputTransform.smoothing(smooth))
    refitted = refit_branch(problem, rounded(problem, branch, "nvfp4"), seed=0)
    assert relative_error(layer_output(held_out, refitted, 1.0, 0), reference) < 0.01


# --- inputs that are rounded too ---


@pytest.fixture
def noisy(case):
    """A problem with noise, and W, H + damping and D of it in the transformed space, float64."""
    W, train, H, smooth, *_ = case
    transform = InputTransform(smooth, torch.zeros_like(smooth), 32)
    noise = rounding_noise(
        [train], transform, QuantScheme(get_format("int4"), "ceil", get_format("int4"), "ceil", "absmax")
    )
    problem = problem_of(W, H, transform, noise)
    D = torch.diag(noise.double())
    damped = transform.hessian(H).double()
    damped += 0.01 * (damped + D).diagonal().mean() * torch.eye(len(H))
    return problem, transform.weight(W).double(), damped, D


def test_noise_is_the_variance_that_rounding_adds(case):
    """int4 by its definition: absmax of 64 channels at 7, whole numbers; two samples with the same weight."""
    _, train, _, smooth, *_ = case
    transform = InputTransform.smoothing(smooth)
    samples = [train[:100], train[100:1000]]
    expected = []
    for x in samples:
        z = (x / smooth.float()).unflatten(-1, (-1, 64))
        step = z.abs().amax(-1, keepdim=True).bfloat16().float() / 7
        expected.append(((z / step).round() * step - z).square().flatten(1).mean(0))
    found = rounding_noise(
        samples, transform, QuantScheme(get_format("int4"), "ceil", get_format("int4"), "ceil", "absmax")
    )
    torch.testing.assert_close(found, (expected[0] + expected[1]) / 2, rtol=0.02, atol=0)


def test_target_is_the_least_squares_weight_for_noisy_inputs(noisy):
    """X H (H + D)^-1 by a solve in float64."""
    problem, W, H, D = noisy
    torch.testing.assert_close(problem.target.double(), torch.linalg.solve(H + D, (W @ H).T).T, rtol=0, atol=1e-4)


def test_target_minimizes_the_error_with_noise(noisy):
    """Every small change of the target raises tr((W - Q) H (W - Q)^T) + tr(Q D Q^T)."""
    problem, W, H, D = noisy

    def cost(Q):
        return torch.trace((W - Q) @ H @ (W - Q).T + Q @ D @ Q.T).item()

    Q, generator = problem.target.double(), torch.Generator().manual_seed(0)
    assert cost(Q) < cost(W)
    for _ in range(5):
        step = torch.randn(Q.shape, generator=generator).double() * 1e-2 * Q.std()
        assert min(cost(Q + step), cost(Q - step)) > cost(Q)


def test_first_branch_leaves_the_smallest_error_to_the_noise(case, noisy):
    """The best Q leaves tr((W - L) G (W - L)^T), G = H - H (H + D)^-1 H; the best L is known from eigenvalues."""
    problem, W, H, D = noisy
    down, up = initial_branch(problem, branch_of(case[0], case[3]), seed=0)
    E = W - up.double() @ problem.transform.weight(down.T).double()
    G = H - H @ torch.linalg.solve(H + D, H)
    best = torch.linalg.eigvalsh(W @ G @ W.T)[:-8].sum().item()
    assert best <= torch.trace(E @ G @ E.T).item() < 1.01 * best  # the branch is stored in bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_noise_aware_codes_have_a_smaller_error_on_rounded_inputs(case, noisy, name):
    """Where the inputs are rounded, branch and codes for noisy inputs are better than those for exact inputs."""
    W, _, H, smooth, held_out, reference = case
    problem, *_ = noisy
    exact, errors = problem_of(W, H, problem.transform), []
    for variant, branch in (
        (exact, branch_of(W, smooth)),
        (problem, initial_branch(problem, branch_of(W, smooth), seed=0)),
    ):
        errors.append(
            relative_error(layer_output(held_out, rounded(variant, branch, name, "int4"), 1.0, 0), reference).item()
        )
    assert errors[1] < errors[0]


def test_the_branch_is_refitted_with_the_damped_hessian(noisy):
    """H with 0.01 of the mean diagonal of H + D on its diagonal, as in the factor."""
    problem, _, H, _ = noisy
    thin = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        problem.times_hessian(thin).double(), H @ thin.double(), rtol=0, atol=1e-5 * H.abs().max().item()
    )


def test_some_rows_are_rounded_as_all_of_them_are(noisy, case):
    problem, rows = noisy[0], torch.tensor([3, 40, 41])
    down, up = branch_of(case[0], case[3])
    whole, part = rounded(problem, (down, up), "int4"), rounded(select_rows(problem, rows), (down, up[rows]), "int4")
    torch.testing.assert_close(dequantized_weight(part), dequantized_weight(whole)[rows], rtol=0, atol=0)


def test_with_damping_equals_a_problem_made_with_it(noisy):
    problem = noisy[0]
    again, expected = (
        with_damping(problem, 0.5, act_order=True),
        make_problem(problem.W, problem.transform, problem.hessian, problem.noise, damping=0.5, act_order=True),
    )
    assert torch.equal(again.target, expected.target) and torch.equal(again.factor.U, expected.factor.U)
    assert (again.factor.damping, again.factor.ridge) == (0.5, expected.factor.ridge)


def test_without_noise_the_target_is_the_weight(case):
    W, _, H, smooth, *_ = case
    transform = InputTransform(smooth, torch.zeros_like(smooth), 0)
    problem = problem_of(W, H, transform)
    assert torch.equal(problem.target, W * smooth.float())
    layer = rounded(problem, branch_of(W, smooth), "int4")
    assert torch.equal(
        dequantized_weight(layer),
        dequantized_weight(rounded(problem_of(W, H, transform, torch.zeros(128)), branch_of(W, smooth), "int4")),
    )
