import pytest
import torch
from comfy_kitchen.backends.eager.svdquant import _pack_int4_row_major

from stepquant.errors import UserError
from stepquant.formats import pack_nibbles, unpack_nibbles


def test_low_nibble_holds_the_even_column():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[2 * 16 + 1, 0 * 16 + 15]]


def test_every_byte_round_trips():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    codes = unpack_nibbles(packed)
    assert codes.shape == (4, 128)
    assert codes.max() == 15
    assert torch.equal(pack_nibbles(codes), packed)


def test_leading_dimensions_are_kept():
    codes = torch.arange(2 * 3 * 8, dtype=torch.uint8).view(2, 3, 8) % 16
    assert pack_nibbles(codes).shape == (2, 3, 4)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


def test_packs_like_comfy_kitchen():
    codes = torch.randint(0, 16, (5, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(pack_nibbles(codes), _pack_int4_row_major(codes).view(torch.uint8))


def test_odd_columns_are_refused():
    with pytest.raises(UserError, match="7 columns"):
        pack_nibbles(torch.zeros(2, 7, dtype=torch.uint8))
