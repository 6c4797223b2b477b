"""round_site without any stage: it lowers the held-out error, and every setting has its effect."""

import pytest
import torch

from stepquant.quantize.quantized_layer import layer_output, relative_error
from stepquant.quantize.smooth import round_to_nearest
from stepquant.recipe.factor import factor_site
from stepquant.recipe.round import damped_problem, round_site
from stepquant.recipe.settings import quant_scheme

FORMATS = ["int4", "mxfp4", "nvfp4"]


def held_out_error(site, layer) -> float:
    x = torch.cat(site.statistics.heldout)
    return relative_error(layer_output(x, layer, 1.0, 0), x @ site.W.T).item()


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_and_refits_lower_the_held_out_error(site, settings, name):
    chosen = settings(name)
    factors, _ = factor_site(site.W, site.statistics, chosen.factor)
    scheme = quant_scheme(chosen.factor.format)
    nearest = round_to_nearest(site.W, factors.transform, *factors.branch, scheme)
    residual, _ = round_site(site.W, site.statistics, factors, chosen.round)
    assert held_out_error(site, residual.layer(factors.transform, scheme)) < 0.95 * held_out_error(site, nearest)


def test_the_record_holds_the_damping_that_validation_selected(site, settings):
    dampings = [0.0003, 0.005, 0.1]
    factors, _ = factor_site(site.W, site.statistics, settings("int4").factor)
    _, record = round_site(site.W, site.statistics, factors, settings("int4", gptq={"dampings": dampings}).round)
    errors = record["validation_errors"]
    assert 2 <= len(errors) <= 3
    assert record["damping"] == dampings[errors.index(min(errors))]
    assert record["dampings"] == dampings and record["retries"] == 0 and record["dead_channels"] == 0


def test_a_single_damping_needs_no_validation_tokens(site, settings):
    factors, _ = factor_site(site.W, site.statistics, settings("int4").factor)
    load = site.statistics.load

    def without_validation(name: str) -> torch.Tensor:
        assert not name.startswith("validation")
        return load(name)

    site.statistics.load = without_validation
    chosen = settings("int4", gptq={"dampings": [0.01]})
    assert round_site(site.W, site.statistics, factors, chosen.round)[1]["validation_errors"] == []


def test_without_noise_and_refits_the_branch_is_the_searched_one(site, settings):
    factors, _ = factor_site(site.W, site.statistics, settings("int4").factor)
    chosen = settings("int4", gptq={"noise": 0.0, "refits": 0})
    residual, _ = round_site(site.W, site.statistics, factors, chosen.round)
    assert torch.equal(residual.proj_down, factors.proj_down) and torch.equal(residual.proj_up, factors.proj_up)


def test_rank_zero_has_an_empty_branch(site, settings):
    chosen = settings("int4", lowrank={"rank": 0})
    factors, _ = factor_site(site.W, site.statistics, chosen.factor)
    residual, _ = round_site(site.W, site.statistics, factors, chosen.round)
    assert residual.proj_down.shape == (128, 0) and residual.proj_up.shape == (48, 0)


def test_the_problem_rests_on_the_hessian_of_the_transformed_input(site, settings):
    """The mean over bins of z^T z over all calibration tokens, z by the transform."""
    factors, _ = factor_site(site.W, site.statistics, settings("int4").factor)
    problem, _ = damped_problem(site.W, site.statistics, factors, settings("int4", gptq={"dampings": [0.01]}).round)
    z = [factors.transform.apply(x).double() for x in site.calibration]
    expected = (sum(each.T @ each / len(each) for each in z) / 2).float()
    torch.testing.assert_close(problem.hessian, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
