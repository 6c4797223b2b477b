"""The block-Hadamard rotation: the matrix, its inverse, and a layer that it must not change."""

import pytest
import torch

from stepquant.errors import UserError
from stepquant.quantize.rotate import hadamard, rotate

BLOCKS = [16, 32, 64, 128]


def test_matrix_of_order_four():
    expected = 0.5 * torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    assert torch.equal(hadamard(4), expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_rotation_is_its_own_inverse(layer, block):
    x = layer[1]
    torch.testing.assert_close(rotate(rotate(x, block), block), x, rtol=1e-5, atol=1e-4)


def test_an_outlier_is_spread_over_its_block_alone():
    x = torch.zeros(1, 128)
    x[0, 40] = 8.0
    y = rotate(x, 64)
    assert torch.equal(y.abs(), torch.cat([torch.ones(1, 64), torch.zeros(1, 64)], dim=1))


@pytest.mark.parametrize("block", BLOCKS)
def test_layer_without_quantization_is_unchanged(layer, block):
    W, x = layer
    torch.testing.assert_close(
        rotate(x, block).double() @ rotate(W, block).double().T, x.double() @ W.double().T, rtol=0, atol=1e-4
    )


def test_block_zero_is_no_rotation(layer):
    assert rotate(layer[1], 0) is layer[1]


@pytest.mark.parametrize("block", [-2, 48, 256])
def test_impossible_block_is_refused(layer, block):
    with pytest.raises(UserError, match=f"block {block} for 128 channels"):
        rotate(layer[1], block)
