"""E2M1 against hand-written values and torchao's bit-level conversion."""

import torch
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked

from stepquant.formats.e2m1 import from_e2m1_codes, round_e2m1, to_e2m1_codes

from .inputs import midpoints

POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES = POSITIVE + [-v for v in POSITIVE]
CODES = torch.arange(16, dtype=torch.uint8)


def test_all_codes_decode_to_the_written_table():
    decoded = from_e2m1_codes(CODES)
    assert decoded.tolist() == VALUES
    assert torch.signbit(decoded).tolist() == [False] * 8 + [True] * 8  # code 8 is negative zero
    assert torch.equal(decoded, f4_unpacked_to_f32(CODES))


def test_all_values_encode_to_their_codes():
    assert torch.equal(to_e2m1_codes(torch.tensor(VALUES)), CODES)


def test_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = [0, 2, 2, 4, 4, 6, 6]  # between codes 0|1, 1|2, 2|3, 3|4, 4|5, 5|6, 6|7
    assert to_e2m1_codes(ties.clone()).tolist() == even
    assert to_e2m1_codes(-ties).tolist() == [code + 8 for code in even]


def test_saturates_at_six():
    beyond = torch.tensor([6.0, 6.5, 7.0, 8.0, 1e30, torch.inf])
    assert to_e2m1_codes(beyond.clone()).tolist() == [7] * 6
    assert to_e2m1_codes(-beyond).tolist() == [15] * 6


def test_rounds_like_torchao_around_every_midpoint_and_everywhere_else():
    spread = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 3
    small = torch.tensor([1e-45, 1e-38, 1e-20, 0.1])
    y = torch.cat((spread, midpoints(POSITIVE), small))
    y = torch.cat((y, -y))
    assert torch.equal(to_e2m1_codes(y.clone()), f32_to_f4_unpacked(y))


def test_rounding_is_encoding_and_decoding():
    y = torch.cat((torch.linspace(-9, 9, 10_001), midpoints(POSITIVE)))
    assert torch.equal(round_e2m1(y.clone()), from_e2m1_codes(to_e2m1_codes(y.clone())))
