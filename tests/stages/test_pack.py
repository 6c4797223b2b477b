"""What stage pack writes, where the variants of the whole pipeline's test show nothing of it."""

from pathlib import Path

import torch

from stages._stage import described_model
from stepquant.evaluate.packed_layers import PackedExpert
from stepquant.formats import get_format
from stepquant.quantize.activation_scales import fake_quantize_activation


def test_activation_scales_by_error_reach_the_packed_layers(folder):
    folder.set("format.weight", "nvfp4")
    folder.set("format.activation", "nvfp4")
    folder.set("format.activation_scales", "error")
    folder.finish("pack", "--variant", "rtn")
    packed = PackedExpert(Path("artifacts/checkpoints/rtn/transformer"), "cpu")
    assert packed.settings.activation_scales == "error"
    (linear,) = packed.linears(0, described_model().expert("high_noise").sites["ffn.up"])
    x = torch.randn(20, linear.in_features, generator=torch.Generator().manual_seed(0)) ** 3
    rounded = {
        rule: fake_quantize_activation(x, get_format("nvfp4"), rule, clip=1.0, exponent_offset=0, rounding="ceil")
        for rule in ("absmax", "error")
    }
    assert torch.equal(linear.quantized_input(x), rounded["error"])  # smoothing factors of variant rtn are 1
    assert not torch.equal(rounded["error"], rounded["absmax"])
