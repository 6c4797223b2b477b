"""Statistics of a site's input accumulated on a device, and read back onto it."""

import pytest
import torch

from stepquant.calibration.merge import merge_shards
from stepquant.calibration.observer import SiteObserver
from stepquant.calibration.sampling_plan import plan_sampling
from stepquant.calibration.statistics_files import read_statistics
from stepquant.calibration.trajectories import Call
from stepquant.models.bins import Bins
from tests.device_fixture import assert_as_on_cpu, tolerance

TOKENS, CHANNELS = 12, 24
BINS = Bins((1000.0, 500.0, 0.0))
CALLS = [
    Call(split, split, step, 0, t)
    for split in ("calibration", "validation", "heldout")
    for step, t in enumerate((900.0, 100.0))
]
SAMPLES = {"calibration": 7, "validation": 4, "heldout": 5}


def observed(x: torch.Tensor, device: str) -> dict[str, torch.Tensor]:
    plan = plan_sampling(CALLS, BINS, TOKENS, SAMPLES, 0, stride=2)
    site = SiteObserver(CHANNELS, plan, device, "low_noise block 0 attn1.qkv")
    site.observe(x.to(device), CALLS, range(len(CALLS)))
    return site.tensors()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(device, tmp_path, dtype):
    x = torch.randn(len(CALLS), TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, found = observed(x, "cpu"), observed(x, device)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerance(device))
    merge_shards(tmp_path, [found])
    here, there = read_statistics(tmp_path, "cpu"), read_statistics(tmp_path, device)
    point = torch.ones(CHANNELS)
    assert_as_on_cpu(there.hessian_about(point.to(device)), here.hessian_about(point), device)
    assert_as_on_cpu(torch.cat(there.search), torch.cat(here.search), device)
