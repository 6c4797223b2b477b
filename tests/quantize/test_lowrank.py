"""The low-rank branch against numpy's SVD, and the identity that branch and residual satisfy."""

import numpy as np
import pytest
import torch

from stepquant.errors import UserError
from stepquant.quantize.lowrank import low_rank_factors, residual, stored_branch
from stepquant.quantize.smooth import smoothing_factor


def decaying_matrix(rows: int, channels: int) -> torch.Tensor:
    """Singular values 1/1, 1/2, 1/3, ... with random singular vectors."""
    generator = torch.Generator().manual_seed(2)
    n = min(rows, channels)
    U = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(channels, n, generator=generator, dtype=torch.float64)).Q
    return ((U / torch.arange(1, n + 1)) @ V.T).float()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (300, 400)], ids=["exact tall", "exact wide", "randomized"])
@pytest.mark.parametrize("rank", [1, 8])
def test_error_is_that_of_the_truncated_svd(shape, rank):
    W = decaying_matrix(*shape)
    down, up = low_rank_factors(W, rank, seed=0)
    assert down.shape == (rank, shape[1]) and up.shape == (shape[0], rank)
    # Eckart-Young: the best error of rank r is the norm of the singular values that are left out.
    best = np.linalg.norm(np.linalg.svd(W.numpy(), compute_uv=False)[rank:])
    assert torch.linalg.norm(W - up @ down).item() == pytest.approx(best, rel=1e-4)


def test_same_seed_same_bits():
    W = decaying_matrix(300, 400)
    for one, two in zip(low_rank_factors(W, 8, seed=7), low_rank_factors(W, 8, seed=7), strict=True):
        assert torch.equal(one, two)


def test_full_rank_leaves_nothing(layer):
    W, _ = layer
    down, up = low_rank_factors(W, 48, seed=0)
    torch.testing.assert_close(up @ down, W, rtol=0, atol=1e-5)


def test_rank_zero_leaves_everything(layer):
    W, x = layer
    smooth = smoothing_factor(x.abs().amax(0), W.abs().amax(0), alpha=0.5, beta=0.5)
    proj_down, proj_up = stored_branch(*low_rank_factors(W, 0, seed=0), smooth)
    assert proj_down.shape == (128, 0) and proj_up.shape == (48, 0)
    assert torch.equal(residual(W, smooth, proj_down, proj_up), W * smooth.float())


@pytest.mark.parametrize("rank", [-1, 49])
def test_impossible_rank_is_refused(layer, rank):
    with pytest.raises(UserError, match=f"rank {rank} .*48 x 128.*0 to 48"):
        low_rank_factors(layer[0], rank, seed=0)


@pytest.mark.parametrize("rank", [4, 48])
def test_stored_branch_and_residual_give_the_layer_back(layer, rank):
    """(x/s) @ residual.T + (x @ proj_down) @ proj_up.T = x @ W.T, although the stored factors are rounded."""
    W, x = layer
    smooth = smoothing_factor(x.abs().amax(0), W.abs().amax(0), alpha=0.5, beta=0.5)
    proj_down, proj_up = stored_branch(*low_rank_factors(W * smooth.float(), rank, seed=0), smooth)
    assert proj_down.dtype == proj_up.dtype == smooth.dtype == torch.bfloat16
    rest = residual(W, smooth, proj_down, proj_up).double()
    quantized_path = (x.double() / smooth.double()) @ rest.T
    branch = (x.double() @ proj_down.double()) @ proj_up.double().T
    torch.testing.assert_close(quantized_path + branch, x.double() @ W.double().T, rtol=0, atol=1e-4)


def test_residual_of_the_full_branch_is_rounding_only(layer):
    """bfloat16 keeps 8 bits: each factor is off by at most 2^-9, so a full-rank branch leaves less than one percent."""
    W, x = layer
    smooth = smoothing_factor(x.abs().amax(0), W.abs().amax(0), alpha=0.5, beta=0.5)
    Ws = W * smooth.float()
    rest = residual(W, smooth, *stored_branch(*low_rank_factors(Ws, 48, seed=0), smooth))
    assert torch.linalg.norm(rest) < 0.01 * torch.linalg.norm(Ws)


def test_stacked_linears_have_one_down(make_layer):
    q, k, v = (make_layer(seed, rows=64, channels=64, tokens=1)[0] for seed in (1, 2, 3))
    smooth = torch.ones(64, dtype=torch.bfloat16)
    proj_down, proj_up = stored_branch(*low_rank_factors(torch.cat([q, k, v]), 16, seed=0), smooth)
    assert proj_down.shape == (64, 16) and proj_up.shape == (192, 16)
    # The joint decomposition uses its rank for all three: none is approximated better than on its own.
    for W, up in zip((q, k, v), proj_up.float().split(64), strict=True):
        left = torch.linalg.norm(W - up @ proj_down.float().T)
        best = torch.linalg.norm(torch.linalg.svdvals(W)[16:])
        assert best <= left < torch.linalg.norm(W)
