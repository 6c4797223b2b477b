"""GPTQ against a textbook OBQ in float64, and the properties it must have."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from stepquant.errors import UserError
from stepquant.formats import Scales, get_format, weight_scales
from stepquant.formats.asym_w4a8 import CODEBOOK
from stepquant.quantize.gptq import gptq, inverse_factor

FORMATS = ["int4", "mxfp4", "nvfp4", "asym_w4a8"]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def rounded(
    W: Tensor, H: Tensor, scales: Scales, fmt, *, damping: float, act_order: bool, column_block: int = 128
) -> SimpleNamespace:
    """Codes, and the record of the factorization of H."""
    factor = inverse_factor(H, damping=damping, act_order=act_order)
    codes = gptq(W, factor, scales, fmt, column_block=column_block)
    return SimpleNamespace(codes=codes, damping=factor.damping, retries=factor.retries, dead=factor.dead)


def levels(name: str, scales: Scales) -> Tensor:
    """The 16 values of every group in ascending order, written out, float64 [N, K/g, 16]."""
    group = scales.group
    if name == "asym_w4a8":
        integers = torch.tensor(CODEBOOK) * group.float()[..., None]
        return integers.round().clamp(-127, 127).double() * scales.row.double()[:, None, None]
    if name == "int4":
        return torch.arange(-8, 8, dtype=torch.float64) * group.double()[..., None]
    scale = 2.0 ** (group.double() - 127) if name == "mxfp4" else group.double() * scales.tensor.double()
    return torch.tensor([-v for v in E2M1[::-1]] + E2M1, dtype=torch.float64) * scale[..., None]


def obq(W: Tensor, H: Tensor, scales: Scales, name: str, damping: float, act_order: bool) -> Tensor:
    """Values (not codes) by Optimal Brain Quantization with a fixed order: one column at a time, in float64.

    Uses the explicit inverse and removes each column from it by Gaussian elimination (GPTQ paper, equations 2 and 3),
    where GPTQ uses a Cholesky factor and blocks.
    """
    W, H, g = W.double().clone(), H.double(), get_format(name).group
    K = H.shape[0]
    Hinv = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(K, dtype=torch.float64))
    order = H.diagonal().argsort(descending=True).tolist() if act_order else range(K)
    Q, left = torch.empty_like(W), torch.ones(K, dtype=torch.bool)
    for i in order:
        allowed = levels(name, scales)[:, i // g]
        nearest = (W[:, i, None] - allowed).abs().argmin(dim=1, keepdim=True)
        Q[:, i] = allowed.gather(1, nearest).squeeze(1)
        left[i] = False
        W[:, left] -= torch.outer((W[:, i] - Q[:, i]) / Hinv[i, i], Hinv[i, left])
        Hinv = Hinv - torch.outer(Hinv[:, i], Hinv[i]) / Hinv[i, i]
    return Q


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_equals_textbook_obq(layer, name, act_order):
    W, x = layer
    fmt, H = get_format(name), x.T @ x
    scales = weight_scales(fmt, W, rounding="floor")
    result = rounded(W, H, scales, fmt, damping=0.01, act_order=act_order, column_block=32)
    expected = obq(W, H, scales, name, 0.01, act_order)
    torch.testing.assert_close(fmt.decode(result.codes, scales).double(), expected, rtol=1e-6, atol=0)
    assert (result.damping, result.retries, result.dead) == (0.01, 0, 0)


@pytest.mark.parametrize("column_block", [1, 48, 128])
@pytest.mark.parametrize("act_order", [False, True])
def test_column_block_changes_nothing(layer, column_block, act_order):
    W, x = layer
    fmt = get_format("nvfp4")
    scales = weight_scales(fmt, W, rounding="ceil")
    one, two = (
        rounded(W, x.T @ x, scales, fmt, damping=0.01, act_order=act_order, column_block=size).codes
        for size in (16, column_block)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_identity_hessian_rounds_to_nearest(layer, name, act_order):
    W, _ = layer
    fmt = get_format(name)
    scales = weight_scales(fmt, W, rounding="ceil")
    result = rounded(W, 3.0 * torch.eye(W.shape[1]), scales, fmt, damping=0.01, act_order=act_order)
    assert torch.equal(result.codes, fmt.encode(W, scales))


@pytest.mark.parametrize("name", FORMATS)
def test_beats_rounding_on_held_out_tokens(make_layer, name):
    W, x = make_layer(seed=1, rows=32, channels=128, tokens=8192)
    train, held_out = x[:4096], x[4096:]
    fmt = get_format(name)
    scales = weight_scales(fmt, W, rounding="ceil")

    def error(codes: Tensor) -> float:
        return torch.linalg.norm(held_out @ (fmt.decode(codes, scales) - W).T).item()

    nearest = error(fmt.encode(W, scales))
    for act_order in (False, True):
        result = rounded(W, train.T @ train, scales, fmt, damping=0.01, act_order=act_order)
        assert error(result.codes) < 0.9 * nearest


def test_rows_are_independent(layer):
    W, x = layer
    fmt = get_format("int4")
    scales = weight_scales(fmt, W, rounding="ceil")
    together = rounded(W, x.T @ x, scales, fmt, damping=0.01, act_order=True).codes
    for rows in (slice(0, 16), slice(16, 48)):
        alone = rounded(W[rows], x.T @ x, Scales(scales.group[rows], None), fmt, damping=0.01, act_order=True).codes
        assert torch.equal(together[rows], alone)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_channels_are_rounded_and_counted(layer, act_order):
    W, x = layer
    dead, live = [5, 64, 127], [i for i in range(128) if i not in (5, 64, 127)]
    x = x.clone()
    x[:, dead] = 0
    fmt = get_format("mxfp4")
    scales = weight_scales(fmt, W, rounding="ceil")
    result = rounded(W, x.T @ x, scales, fmt, damping=0.01, act_order=act_order)
    assert result.dead == 3
    assert torch.equal(result.codes[:, dead], fmt.encode(W, scales)[:, dead])
    # The weight of a dead channel does not influence the others.
    changed = W.clone()
    changed[:, dead] *= -0.5
    again = rounded(changed, x.T @ x, scales, fmt, damping=0.01, act_order=act_order)
    assert torch.equal(result.codes[:, live], again.codes[:, live])


def test_nothing_but_dead_channels(layer):
    W, _ = layer
    fmt = get_format("int4")
    scales = weight_scales(fmt, W, rounding="ceil")
    result = rounded(W, torch.zeros(128, 128), scales, fmt, damping=0.01, act_order=True)
    assert result.dead == 128
    assert torch.equal(result.codes, fmt.encode(W, scales))


def test_failed_cholesky_is_retried_with_more_damping(layer):
    W, _ = layer
    fmt = get_format("int4")
    scales = weight_scales(fmt, W, rounding="ceil")
    # Unit diagonal and one eigenvalue of 1 - 1.5 = -0.5, as rounding may cause: damping 0.01 and 0.1 are too small
    # to lift it above zero, 1.0 is enough.
    H = torch.eye(128)
    H[0, 1] = H[1, 0] = 1.5
    result = rounded(W, H, scales, fmt, damping=0.01, act_order=False)
    assert result.retries == 2
    assert result.damping == pytest.approx(1.0)


def test_the_factor_of_many_columns_inverts_the_hessian(make_layer):
    """Wide enough for several halvings of the triangle."""
    _, x = make_layer(seed=5, rows=8, channels=640, tokens=2560)
    H = (x / x.std(0)).T @ (x / x.std(0)) / len(x)
    U = inverse_factor(H, damping=0.01, act_order=False).U.double()
    assert torch.equal(U, U.triu())
    damped = H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(640, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(640, dtype=torch.float64), rtol=0, atol=1e-4)


def test_a_hessian_that_no_damping_helps_is_refused(layer):
    W, _ = layer
    fmt = get_format("int4")
    scales = weight_scales(fmt, W, rounding="ceil")
    H = torch.eye(128)
    H[0, 1] = H[1, 0] = 1e8
    with pytest.raises(UserError, match="not positive definite.*gptq.dampings"):
        rounded(W, H, scales, fmt, damping=0.01, act_order=False)


@pytest.mark.parametrize("broken", ["weight", "Hessian"])
def test_non_finite_input_is_refused(layer, broken):
    W, x = layer
    fmt, H = get_format("int4"), x.T @ x
    scales = weight_scales(fmt, W, rounding="ceil")
    (W if broken == "weight" else H)[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"GPTQ {broken}"):
        rounded(W, H, scales, fmt, damping=0.01, act_order=False)


def test_inputs_are_not_changed(layer):
    W, x = layer
    H = x.T @ x
    W_before, H_before = W.clone(), H.clone()
    fmt = get_format("nvfp4")
    rounded(W, H, weight_scales(fmt, W, rounding="ceil"), fmt, damping=0.01, act_order=True)
    assert torch.equal(W, W_before) and torch.equal(H, H_before)
