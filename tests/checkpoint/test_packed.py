from dataclasses import replace

import pytest
import torch

from stepquant.checkpoint.packed import pack_linear
from stepquant.formats import Scales
from stepquant.runtime.layout import QuantizationSettings


def packed_int4():
    codes = torch.zeros(2, 64, dtype=torch.uint8)
    codes[0, :4] = torch.tensor([1, 15, 8, 7])
    scales = Scales(torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16), None)
    smooth = torch.ones(64, dtype=torch.bfloat16)
    down, up = torch.zeros(64, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)
    return pack_linear(codes, scales, smooth, proj_down=down, proj_up=up, clip_ratio=torch.tensor([1.0, 0.9]))


SETTINGS = QuantizationSettings("int4", "int4", "ceil", "absmax", 3, False, {}, (1000.0, 950.0, 900.0), ("a",))


def test_bytes_by_hand():
    packed = packed_int4()
    # Columns 0, 1 hold 1 and 15 (-1): low nibble 0x1, high nibble 0xf -> 0xf1 = -15 as int8; columns 2, 3: 0x78 = 120.
    assert packed.qweight.dtype == torch.int8
    assert packed.qweight[0, :3].tolist() == [-15, 120, 0]
    assert packed.qweight[1].count_nonzero() == 0
    assert packed.wscales.tolist() == [[0.5, 2.0]]  # [K/G, N]
    assert packed.wscales.is_contiguous()
    assert packed.wtscale is None and packed.wcscales is None
    packed.check(SETTINGS, N=2, K=64)


def test_tensor_scale():
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    group = torch.ones(2, 1).to(torch.float8_e4m3fn)
    smooth = torch.ones(16, dtype=torch.bfloat16)
    packed = pack_linear(codes, Scales(group, torch.tensor(0.0078125)), smooth)
    assert packed.wtscale.dtype == torch.bfloat16 and packed.wtscale.tolist() == [2**-7]
    assert packed.wcscales.dtype == torch.bfloat16 and packed.wcscales.tolist() == [1.0, 1.0]
    packed.check(QuantizationSettings("nvfp4", None, "ceil", "absmax", 0, False, {}, (1000.0, 0.0), ("a",)), N=2, K=16)
    with pytest.raises(ValueError, match="not a bfloat16 value"):
        pack_linear(codes, Scales(group, torch.tensor(1 / 3)), smooth)


@pytest.mark.parametrize(
    "change",
    [
        {"smooth_factor": torch.ones(64)},
        {"proj_down": None},
        {"clip_ratio": torch.ones(3)},
        {"clip_ratio": None},
        {"clip_exponent": torch.zeros(2, dtype=torch.int8)},
        {"wscales": torch.ones(2, 1, dtype=torch.bfloat16)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_check_names_what_does_not_fit(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(packed_int4(), **change).check(SETTINGS, N=2, K=64)
