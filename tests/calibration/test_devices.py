"""Statistics of a site's input accumulated on a device, and read back onto it."""

import pytest
import torch

from stepquant.calibration.activations import read_activations
from stepquant.calibration.statistics import SiteStatistics, plan_site, write_statistics
from stepquant.calibration.trajectories import Call
from stepquant.models.bins import Bins
from tests.device_fixture import assert_as_on_cpu

TOKENS, CHANNELS = 12, 24
BINS = Bins((1000.0, 500.0, 0.0))
CALLS = [Call(split, split, step, 0, t) for split in ("calibration", "validation", "heldout") for step, t in enumerate((900.0, 100.0))]
SAMPLES = {"calibration": 7, "validation": 4, "heldout": 5}


def observed(x: torch.Tensor, device: str) -> dict[str, torch.Tensor]:
    plan = plan_site(CALLS, BINS, TOKENS, SAMPLES, 0, stride=2)
    site = SiteStatistics(CHANNELS, plan, device, "low_noise block 0 attn1.qkv")
    site.add(x.to(device), CALLS, range(len(CALLS)))
    return site.tensors()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(device, tmp_path, dtype):
    x = torch.randn(len(CALLS), TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, found = observed(x, "cpu"), observed(x, device)
    for name, tensor in found.items():
        assert_as_on_cpu(tensor, expected[name], "cpu" if not device.startswith("cuda") else device)
    write_statistics(tmp_path, [found])
    here, there = read_activations(tmp_path, "cpu"), read_activations(tmp_path, device)
    point = torch.ones(CHANNELS)
    assert_as_on_cpu(there.second_moment_about(point.to(device)), here.second_moment_about(point), device)
    assert_as_on_cpu(torch.cat(there.search), torch.cat(here.search), device)
