"""A quantized linear moved to a device gives the CPU's output, whichever bin is current."""

import copy

import pytest
import torch
from torch import nn

from stepquant.runtime.layout import QuantizationSettings
from stepquant.runtime.linear import W4A4Linear
from stepquant.runtime.timestep import follow_timestep
from tests.device_fixture import assert_as_on_cpu

N, K, RANK = 48, 128, 4


class Denoiser(nn.Module):
    """As much of one as a timestep needs."""

    def __init__(self, weight: str, activation: str | None, eight_bits: str | None):
        super().__init__()
        edges, bins = (1000.0, 900.0, 0.0), (1,) if eight_bits else ()
        listed = {"linear": bins} if eight_bits else {}
        settings = QuantizationSettings(
            weight, activation, "ceil", "absmax", RANK, True, {}, edges, ("linear",), eight_bits, listed
        )
        self.linear = W4A4Linear(K, N, True, settings, device="cpu", rotation=32, eight_bit_bins=bins)
        follow_timestep(self, settings.bin_edges)

    def forward(self, x, timestep):
        return self.linear(x)


@torch.no_grad()
def make_denoiser(*formats: str | None) -> Denoiser:
    denoiser, generator = Denoiser(*formats), torch.Generator().manual_seed(1)
    for name, tensor in denoiser.linear.state_dict().items():
        values = torch.rand(tensor.shape, generator=generator)
        integers = {
            "qweight": (values * 256 - 128).floor(),
            "clip_exponent": (values * 3 - 1).floor(),
            "wscales": 118 + (values * 6).floor(),
        }
        tensor.copy_(integers[name] if name in integers and not tensor.is_floating_point() else 0.5 + values)
    return denoiser


@pytest.mark.parametrize(
    "formats",
    [
        ("int4", "int4", None),
        ("mxfp4", "mxfp4", None),
        ("nvfp4", "nvfp4", None),
        ("nvfp4", None, None),
        ("int4", "int4", "int8"),
        ("mxfp4", "mxfp4", "mxfp8"),
        ("nvfp4", "nvfp4", "mxfp8"),
    ],
    ids=str,
)
@torch.no_grad()
def test_output_per_bin(device, formats):
    here = make_denoiser(*formats)
    there = copy.deepcopy(here).to(device)
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2))
    for timestep in map(torch.tensor, ([950.0, 950.0], [10.0, 10.0], [10.0, 950.0], [950.0])):
        assert_as_on_cpu(
            there(x.to(device), timestep=timestep.to(device)), here(x, timestep=timestep), device, rtol=1e-3, atol=1e-2
        )
