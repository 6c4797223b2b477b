"""asym_w4a8 and int8_row against comfy-kitchen's eager code, and against all levels of a group."""

import pytest
import torch
from comfy_kitchen.backends.eager import w4a8_int8 as kitchen
from comfy_kitchen.backends.eager.quantization import quantize_int8_rowwise
from comfy_kitchen.tensor.int8_utils import _build_hadamard
from torch import Tensor

from stepquant.formats import Scales, get_format, pack_nibbles, unpack_nibbles, weight_scales
from stepquant.formats.asym_w4a8 import CODEBOOK
from stepquant.quantize.rotate import REGULAR, hadamard, rotate

from .inputs import MAGNITUDES, heavy_tailed

FORMAT, ROWS = get_format("asym_w4a8"), get_format("int8_row")


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """[96, 512]; no zero row, for which comfy-kitchen's scale is as good as any."""
    return heavy_tailed(0.02)[1:].repeat(2, 1)


@pytest.fixture(scope="module")
def theirs(weight) -> tuple[Tensor, Scales]:
    """comfy-kitchen's packed codes and scales of the weight, which it rotates first."""
    packed, s_rel, s_channel, correction, codebook = kitchen.quantize_w4a8_int8_weight(weight)
    assert correction is None and torch.equal(codebook, torch.tensor(CODEBOOK))
    return packed, Scales(s_rel, None, s_channel)


def test_codes_and_nibbles_are_those_of_comfy_kitchen(weight, theirs):
    packed, scales = theirs
    codes = FORMAT.encode(rotate(weight, 256, REGULAR), scales)
    assert torch.equal(pack_nibbles(codes).view(torch.int8), packed)


def test_decodes_to_the_integers_of_comfy_kitchen(theirs):
    packed, scales = theirs
    values = FORMAT.decode(unpack_nibbles(packed.view(torch.uint8)), scales)
    integers = kitchen._dequant_int4_grouped_to_int8(packed, scales.group, torch.tensor(CODEBOOK), 16)
    assert torch.equal(values, integers.float() * scales.row[:, None])


def test_rounds_to_the_nearest_level_under_every_scale():
    """Exhaustive in the scale: all E4M3 numbers from 2^-6 on, with 3000 values between -140 and 140 each."""
    group = torch.arange(0x08, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    t = torch.linspace(-140, 140, 3008).expand(len(group), -1).contiguous()
    scales = Scales(group[:, None].expand(-1, 3008 // 16), None, torch.ones(len(group)))
    levels = (torch.tensor(CODEBOOK) * group.float()[:, None]).round().clamp(-127, 127)
    nearest = (t[..., None] - levels[:, None]).abs().amin(-1)
    found = FORMAT.decode(FORMAT.encode(t, scales), scales)
    assert torch.equal((found - t).abs(), nearest)


@pytest.mark.parametrize("clip", [1.0, 0.8, 1.0625])
def test_fake_quantize_is_encode_then_decode(clip):
    x = heavy_tailed(1.0)
    scales = FORMAT.scales(x, clip=clip)
    codes = FORMAT.encode(x, scales)
    assert codes.dtype == torch.uint8 and codes.max() <= 15
    assert torch.equal(FORMAT.fake_quantize(x, clip=clip), FORMAT.decode(codes, scales))


def test_rows_do_not_depend_on_each_other(monkeypatch):
    x = heavy_tailed(1.0)
    whole = FORMAT.fake_quantize(x)
    monkeypatch.setattr("stepquant.formats.asym_w4a8.PANEL", 5 * 512)
    assert torch.equal(FORMAT.fake_quantize(x), whole)
    assert torch.equal(FORMAT.decode(FORMAT.encode(x, FORMAT.scales(x)), FORMAT.scales(x)), whole)


@pytest.mark.parametrize("scale", MAGNITUDES.values(), ids=MAGNITUDES.keys())
def test_scales_keep_zeros_and_cover_the_largest_value(scale):
    x = heavy_tailed(scale)
    scales = weight_scales(FORMAT, x, rounding="ceil")
    rounded = FORMAT.fake_quantize(x)
    assert torch.equal(scales.row[1:], x[1:].abs().amax(1) / 127)
    assert torch.equal(rounded[0], torch.zeros(512)) and torch.equal(rounded[1, :64], torch.zeros(64))
    # E4M3 rounds the scale by up to 1/16, and the outermost level is 2 % inside the absmax.
    assert ((rounded[1:] - x[1:]).abs().amax(1) <= 0.1 * x[1:].abs().amax(1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_comfy_kitchen(dtype):
    x = heavy_tailed(3.0).to(dtype)
    codes, scale = quantize_int8_rowwise(x.float())
    scales = ROWS.scales(x)
    assert torch.equal(scales.group, scale)
    assert torch.equal(ROWS.encode(x, scales).view(torch.int8), codes)
    assert torch.equal(ROWS.fake_quantize(x), (codes.float() * scale).to(dtype))


def test_the_rotation_is_that_of_comfy_kitchen():
    assert torch.equal(hadamard(256, REGULAR), _build_hadamard(256))


def test_output_of_a_linear_is_that_of_comfy_kitchen(weight):
    """To the rounding of float32 sums: that many parts of the sum of magnitudes."""
    x, bias = heavy_tailed(1.0).roll(5, 1), torch.linspace(-1, 1, len(weight))
    rotated = rotate(weight, 256, REGULAR)
    scales = weight_scales(FORMAT, rotated, rounding="ceil")
    codes = FORMAT.encode(rotated, scales)
    z, W = ROWS.fake_quantize(rotate(x, 256, REGULAR)), FORMAT.decode(codes, scales)
    packed, codebook = pack_nibbles(codes).view(torch.int8), torch.tensor(CODEBOOK)
    expected = kitchen.w4a8_int8_linear(
        x, packed, scales.group, scales.row, codebook, bias=bias, out_dtype=torch.float32
    )
    assert ((z @ W.T + bias - expected).abs() <= 1e-6 * (z.abs() @ W.abs().T + 1)).all()
