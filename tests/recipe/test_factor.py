"""factor_site without any stage: what is stored, what is recorded, and how the settings change it."""

import pytest
import torch

from stepquant.quantize.quantized_layer import layer_output, relative_error
from stepquant.quantize.smooth import round_to_nearest
from stepquant.recipe.factor import channel_magnitude, factor_site, smoothing_exponents
from stepquant.recipe.settings import quant_scheme

FORMATS = ["int4", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_record_holds_the_error_of_every_candidate(site, settings, name):
    chosen = settings(name, smooth={"candidates": [0.4, 0.6, 0.8]}, rotate={"hadamard_sizes": [0, 32, 64]})
    factors, record = factor_site(site.W, site.statistics, chosen.factor)
    errors, rotation_errors = record["search_errors"], record["rotation_errors"]
    assert len(errors) == 3 and len(rotation_errors) == 3
    assert record["alpha"] == [0.4, 0.6, 0.8][errors.index(min(errors))] and record["beta"] == 1 - record["alpha"]
    assert factors.rotation == [0, 32, 64][rotation_errors.index(min(rotation_errors))]
    assert record["rotation"] == factors.rotation


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_that_of_the_stored_factors(site, settings, name):
    """Without gradient refinement the smallest recorded error is that of the layer made from what is stored."""
    chosen = settings(name, smooth={"gradient_steps": 0})
    factors, record = factor_site(site.W, site.statistics, chosen.factor)
    layer = round_to_nearest(site.W, factors.transform, *factors.branch, quant_scheme(chosen.factor.format))
    x = torch.cat(site.statistics.search)
    assert relative_error(layer_output(x, layer, 1.0, 0), x @ site.W.T).item() == min(record["rotation_errors"])
    assert not record["learned"]


def test_the_mean_is_that_of_the_bins(site, settings):
    """Each bin has the same weight; rounded to bfloat16, as it is stored."""
    factors, _ = factor_site(site.W, site.statistics, settings("int4").factor)
    expected = torch.stack([x.mean(0) for x in site.calibration]).mean(0).bfloat16()
    assert torch.equal(factors.mean, expected)
    without, _ = factor_site(site.W, site.statistics, settings("int4", center={"means": False}).factor)
    assert not without.mean.any()


def test_gradient_refinement_lowers_the_error_on_held_out_tokens(site, settings):
    errors = []
    for steps in (0, 30):
        chosen = settings("int4", smooth={"gradient_steps": steps}, rotate={"hadamard_sizes": [0]})
        factors, record = factor_site(site.W, site.statistics, chosen.factor)
        layer = round_to_nearest(site.W, factors.transform, *factors.branch, quant_scheme(chosen.factor.format))
        x = torch.cat(site.statistics.heldout)
        errors.append(relative_error(layer_output(x, layer, 1.0, 0), x @ site.W.T).item())
    assert record["learned"] and errors[1] < errors[0]


def test_exponents_that_the_search_tries(settings):
    searched = settings("int4", smooth={"alpha": "search", "beta": None, "candidates": [0.25, 0.75]}).factor.smooth
    assert smoothing_exponents(searched) == [(0.25, 0.75), (0.75, 0.25)]
    fixed = settings("int4", smooth={"alpha": 0.5, "beta": 0.125}).factor.smooth
    assert smoothing_exponents(fixed) == [(0.5, 0.125)]


def test_magnitude_of_a_channel(site):
    mean = torch.stack([x.mean(0) for x in site.calibration]).mean(0)
    squares = [(x - mean).double().square().mean(0) for x in site.calibration]
    expected = (sum(squares) / 2).sqrt().float()
    torch.testing.assert_close(channel_magnitude(site.statistics, mean, "rms"), expected, rtol=1e-4, atol=0)
    largest = torch.cat(site.calibration).abs().amax(0)
    assert torch.equal(channel_magnitude(site.statistics, mean, "absmax"), largest)
