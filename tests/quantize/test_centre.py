"""Centring: exact without quantization, nothing for a mean of zero, less error where channels have means."""

import pytest
import torch

from stepquant.formats import get_format
from stepquant.quantize.centre import centre_bias, centred_moments, centred_output
from stepquant.quantize.layer import Precision, layer_output, relative_error
from stepquant.quantize.smooth import nearest_factors, smoothing_factor

FORMATS = ["int4", "mxfp4", "nvfp4"]


def factors_of(W, H, name):
    fmt = get_format(name)
    smooth = smoothing_factor(H.diagonal().sqrt(), W.abs().amax(0), alpha=0.7, beta=0.3)
    return nearest_factors(W, smooth, rank=8, seed=0, precision=Precision(fmt, "ceil", fmt, "ceil"))


def test_moments_of_two_bins(layer):
    bins = [layer[1][:256].double(), layer[1][256:].double() + 3]
    means = torch.stack([x.mean(0) for x in bins])
    H = torch.cat(bins).T @ torch.cat(bins) / 512
    # The covariance of each bin (numpy's convention: divided by T), averaged.
    expected = torch.stack([torch.cov(x.T, correction=0) for x in bins]).mean(0)
    torch.testing.assert_close(centred_moments(H, means), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_mean_of_zero_changes_nothing(layer, name):
    W, x = layer
    factors, mean = factors_of(W, x.T @ x / len(x), name), torch.zeros(1, 128)
    bias = centre_bias(W, mean, factors.proj_down, factors.proj_up)
    y = centred_output(x, mean[0], bias[0], factors, 1.0, 0)
    assert torch.equal(y, layer_output(x, factors, 1.0, 0))


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_at_the_mean_is_exact(layer, name):
    """x - m = 0 has no rounding error: branch and bias alone give x @ W.T."""
    W, x = layer
    factors, mean = factors_of(W, x.T @ x / len(x), name), 5 * x[:1]
    bias = centre_bias(W, mean, factors.proj_down, factors.proj_up)
    y = centred_output(mean, mean[0], bias[0], factors, 1.0, 0)
    torch.testing.assert_close(y, mean @ W.T, rtol=0, atol=1e-4 * mean.abs().max().item())


@pytest.mark.parametrize("name", FORMATS)
def test_centring_pays_where_channels_have_means(layer, name):
    W, x = layer
    x = x + 2 * x.std(0) * torch.randn(128, generator=torch.Generator().manual_seed(4))
    train, held_out = x[:256], x[256:]
    H, means = train.T @ train / len(train), train.mean(0, keepdim=True)
    plain, centred = factors_of(W, H, name), factors_of(W, centred_moments(H, means), name)
    bias = centre_bias(W, means, centred.proj_down, centred.proj_up)
    reference = held_out @ W.T
    error = relative_error(centred_output(held_out, means[0], bias[0], centred, 1.0, 0), reference)
    assert error < 0.8 * relative_error(layer_output(held_out, plain, 1.0, 0), reference)
