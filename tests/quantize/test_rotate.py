"""The block-Hadamard rotation: the matrix, its inverse, and a layer that it must not change."""

import pytest
import torch

from benchmarks.gptq_launches import OperationLog
from stepquant.errors import UserError
from stepquant.quantize.rotate import REGULAR, hadamard, rotate, rotate_by

SIZES = [16, 32, 64, 128]


def test_matrix_of_order_four():
    expected = 0.5 * torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    assert torch.equal(hadamard(4), expected)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_regular_matrix_is_symmetric_orthogonal_and_has_equal_row_sums(size):
    H = hadamard(size, REGULAR).double()
    assert torch.equal(H, H.T)
    torch.testing.assert_close(H @ H, torch.eye(size, dtype=torch.float64))
    assert torch.equal(H.abs(), torch.full_like(H, size**-0.5))
    assert torch.equal(H.sum(0), torch.ones(size, dtype=torch.float64))  # sqrt(size) more ones than minus ones


@pytest.mark.parametrize("size", SIZES)
def test_rotation_is_its_own_inverse(layer, size):
    x = layer[1]
    torch.testing.assert_close(rotate(rotate(x, size), size), x, rtol=1e-5, atol=1e-4)


def test_an_outlier_is_spread_over_its_hadamard_block_alone():
    x = torch.zeros(1, 128)
    x[0, 40] = 8.0
    y = rotate(x, 64)
    assert torch.equal(y.abs(), torch.cat([torch.ones(1, 64), torch.zeros(1, 64)], dim=1))


@pytest.mark.parametrize("size", SIZES)
def test_layer_without_quantization_is_unchanged(layer, size):
    W, x = layer
    torch.testing.assert_close(
        rotate(x, size).double() @ rotate(W, size).double().T, x.double() @ W.double().T, rtol=0, atol=1e-4
    )


def test_size_zero_is_no_rotation(layer):
    assert rotate(layer[1], 0) is layer[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_a_given_matrix_rotates_to_the_same_bytes(layer, size, dtype):
    x = layer[1].to(dtype)
    matrix = hadamard(size, device=x.device, dtype=dtype)
    assert matrix.dtype == dtype
    assert torch.equal(rotate_by(x, matrix), rotate(x, size))


def test_the_matrix_is_built_on_the_device_of_its_input():
    """The meta device refuses operations with CPU tensors, and a copy from the CPU would count as one."""
    x = torch.empty(2, 128, device="meta")
    assert hadamard(64, device=x.device).device.type == "meta"
    with OperationLog() as log:
        assert rotate(x, 64).shape == (2, 128)
    assert not [name for name in log.names if "copy" in name]


@pytest.mark.parametrize("size", [8, 32, 128])
def test_a_regular_matrix_of_a_size_that_is_no_power_of_four_is_refused(layer, size):
    with pytest.raises(UserError, match=f"size {size} for 128 channels; allowed: 0, or a power of four"):
        rotate(layer[1], size, REGULAR)


@pytest.mark.parametrize("size", [-2, 48, 256])
def test_impossible_size_is_refused(layer, size):
    with pytest.raises(UserError, match=f"Hadamard size {size} for 128 channels"):
        rotate(layer[1], size)
