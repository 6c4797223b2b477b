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

    def __init__(self, weight: str, activation: str | None):
        super().__init__()
        settings = QuantizationSettings(
            weight, activation, "ceil", "absmax", RANK, True, {}, (1000.0, 900.0, 0.0), ("linear",)
        )
        self.linear = W4A4Linear(K, N, True, settings, device="cpu", rotation=32)
        follow_timestep(self, settings.bin_edges)

    def forward(self, x, timestep):
        return self.linear(x)


@torch.no_grad()
def make_denoiser(weight: str, activation: str | None) -> Denoiser:
    denoiser, generator = Denoiser(weight, activation), torch.Generator().manual_seed(1)
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
    ("weight", "activation"), [("int4", "int4"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"), ("nvfp4", None)]
)
@torch.no_grad()
def test_output_per_bin(device, weight, activation):
    here = make_denoiser(weight, activation)
    there = copy.deepcopy(here).to(device)
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2))
    for timestep in map(torch.tensor, ([950.0, 950.0], [10.0, 10.0], [10.0, 950.0], [950.0])):
        assert_as_on_cpu(
            there(x.to(device), timestep=timestep.to(device)), here(x, timestep=timestep), device, rtol=1e-3, atol=1e-2
        )
