"""The input transform: exact without quantization, its Hessian as measured, and useful where it should be."""

import pytest
import torch

from benchmarks.gptq_launches import OperationLog
from stepquant.quantize.lowrank import low_rank_factors, stored_branch
from stepquant.quantize.quantized_layer import layer_output, relative_error
from stepquant.quantize.rotate import rotate
from stepquant.quantize.smooth import nearest_factors, smoothing_factor
from stepquant.quantize.transform import InputTransform
from tests.quantize.scheme import layer_spec

FORMATS = ["int4", "mxfp4", "nvfp4"]


def smoothing_of(W, x):
    return smoothing_factor(x.square().mean(0).sqrt(), W.abs().amax(0), alpha=0.7, beta=0.3)


def held_out_error(W, x, transform, name):
    layer = nearest_factors(W, transform, layer_spec(name))
    return relative_error(layer_output(x, layer, 1.0, 0), x @ W.T).item()


@pytest.mark.parametrize("rotation", [0, 32, 128])
def test_without_quantization_nothing_changes(layer, rotation):
    W, x = layer
    smooth = smoothing_of(W, x)
    transform = InputTransform(smooth, (x.mean(0) + 1).bfloat16(), rotation)
    branch = stored_branch(*low_rank_factors(W * smooth.float(), 8, seed=0), smooth)
    y = transform.apply(x) @ transform.residual(W, *branch).T + x @ branch[0].float() @ branch[1].float().T
    torch.testing.assert_close(y + transform.offset(W, *branch), x @ W.T, rtol=0, atol=1e-5 * x.abs().max().item())


@pytest.mark.parametrize("rotation", [0, 32])
def test_hessian_is_that_of_the_transformed_input(layer, rotation):
    W, x = layer
    mean = x[:100].mean(0).bfloat16()
    transform = InputTransform(smoothing_of(W, x), mean, rotation)
    centered, z = x - mean.float(), transform.apply(x)
    expected = z.T @ z
    torch.testing.assert_close(
        transform.hessian(centered.T @ centered), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_the_rotation_matrix_is_built_once(layer):
    W, x = layer
    smooth = smoothing_of(W, x)
    transform = InputTransform(smooth, torch.zeros_like(smooth), 32)
    z = transform.apply(x)
    with OperationLog() as log:
        again = transform.apply(x)
    assert torch.equal(again, z) and torch.equal(z, rotate(x / smooth.float(), 32))
    assert log.names.count("kron.default") == 0 and "fill_.Scalar" not in log.names


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_at_the_mean_is_exact(layer, name):
    """x - mean = 0 has no rounding error: branch and offset alone give x @ W.T."""
    W, x = layer
    mean = (5 * x[:1]).bfloat16()
    assert held_out_error(W, mean.float(), InputTransform(smoothing_of(W, x), mean[0], 0), name) < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_mean_subtraction_lowers_the_error_where_channels_have_means(layer, name):
    W, x = layer
    x = x + 2 * x.std(0) * torch.randn(128, generator=torch.Generator().manual_seed(4))
    train, held_out = x[:256], x[256:]
    mean = train.mean(0).bfloat16()
    plain = InputTransform.smoothing(smoothing_of(W, train))
    centered = InputTransform(smoothing_of(W, train - mean.float()), mean, 0)
    assert held_out_error(W, held_out, centered, name) < 0.8 * held_out_error(W, held_out, plain, name)


def test_rotation_lowers_the_error_of_int4(layer):
    W, x = layer
    smooth = smoothing_of(W, x[:256])
    plain, rotated = (
        held_out_error(W, x[256:], InputTransform(smooth, torch.zeros_like(smooth), size), "int4") for size in (0, 64)
    )
    assert rotated < 0.9 * plain
