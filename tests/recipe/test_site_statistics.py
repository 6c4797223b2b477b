"""The Hessian about any point, from the one that is stored about the shift."""

import pytest
import torch


@pytest.mark.parametrize("about", ["zero", "mean", "elsewhere"])
def test_hessian_about_a_point(site, about):
    points = {"zero": torch.zeros(128), "mean": site.statistics.mean.mean(0), "elsewhere": torch.linspace(-2, 2, 128)}
    point = points[about]
    moved = [(x - point).double() for x in site.calibration]
    expected = (sum(x.T @ x / len(x) for x in moved) / 2).float()
    largest = expected.abs().max().item()
    torch.testing.assert_close(site.statistics.hessian_about(point), expected, rtol=0, atol=1e-5 * largest)
    variance = site.statistics.variance_about(point)
    torch.testing.assert_close(variance, expected.diagonal(), rtol=0, atol=1e-5 * largest)


def test_statistics_are_loaded_on_each_access(site):
    loaded = []
    load = site.statistics.load
    site.statistics.load = lambda name: loaded.append(name) or load(name)
    assert len(site.statistics.validation) == 2
    assert loaded == ["validation.0", "validation.1"]
