"""Smoothing: the formula by hand, dead channels, and the search on the layer's output."""

import pytest
import torch

from stepquant.errors import UserError
from stepquant.formats import get_format
from stepquant.quantize import smooth as smooth_module
from stepquant.quantize.quantized_layer import (
    LayerSpec,
    QuantScheme,
    layer_output,
    low_rank_path,
    quantized_path,
    relative_error,
)
from stepquant.quantize.smooth import TransformCandidates, nearest_factors, search_transform, smoothing_factor
from stepquant.quantize.transform import InputTransform

CANDIDATES = [(0.0, 0.0), (0.5, 0.5), (0.8, 0.2), (0.6, 0.0)]


def scheme(name: str) -> QuantScheme:
    fmt = get_format(name)
    return QuantScheme(
        weight=fmt, weight_rounding="floor", activation=fmt, activation_rounding="ceil", activation_scales="absmax"
    )


def layer_spec(name: str, rank: int = 8) -> LayerSpec:
    return LayerSpec(rank, 0, scheme(name))


def test_formula():
    # x^0.5 / w^0.5 = [1/2, 2, 8] makes x/s = [2, 2, 2], an eighth of 16: s is an eighth of that.
    s = smoothing_factor(torch.tensor([1.0, 4.0, 16.0]), torch.tensor([4.0, 1.0, 0.25]), alpha=0.5, beta=0.5)
    assert s.dtype == torch.bfloat16
    assert s.tolist() == [0.0625, 0.25, 1.0]


def test_beta_is_free():
    x_magnitude, w_magnitude = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 8.0])
    # x^1 = [1, 4] makes x/s = [1, 1]: s is a sixteenth of that.
    assert smoothing_factor(x_magnitude, w_magnitude, alpha=1.0, beta=0.0).tolist() == [0.0625, 0.25]
    # w^1 = [2, 8] makes x/s = [1/2, 1/2]: s is 1/32 of that.
    assert smoothing_factor(x_magnitude, w_magnitude, alpha=0.0, beta=-1.0).tolist() == [0.0625, 0.25]


def test_smoothed_magnitude_does_not_depend_on_the_input():
    x_magnitude, w_magnitude = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1, torch.ones(64)
    for size in (1e-6, 1.0, 1e6):
        smoothed = size * x_magnitude / smoothing_factor(size * x_magnitude, w_magnitude, alpha=0.5, beta=0.5).float()
        assert smoothed.log().mean().exp().item() == pytest.approx(16, rel=2**-8)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_nvfp4_activations_stay_in_the_range_of_their_scales(layer, size):
    """E4M3 scales reach from 2^-6 to 448, so smoothing must normalize the magnitude of the input."""
    W, x = layer
    x = size * x
    smooth = smoothing_factor(x.abs().amax(0), W.abs().amax(0), alpha=0.5, beta=0.5)
    factors = nearest_factors(W, InputTransform.smoothing(smooth), layer_spec("nvfp4"))
    assert relative_error(layer_output(x, factors, 1.0, 0), x @ W.T) < 0.1


def test_dead_channels_are_not_smoothed():
    # The third channel alone is live: its x/s is 16.
    x_magnitude, w_magnitude = torch.tensor([0.0, 9.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert smoothing_factor(x_magnitude, w_magnitude, alpha=0.5, beta=0.5).tolist() == [1.0, 1.0, 0.0625, 1.0]
    assert smoothing_factor(torch.zeros(3), torch.ones(3), alpha=0.5, beta=0.5).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("alpha", "beta"), CANDIDATES)
def test_without_quantization_nothing_changes(layer, alpha, beta):
    W, x = layer
    s = smoothing_factor(x.abs().amax(0), W.abs().amax(0), alpha=alpha, beta=beta).double()
    torch.testing.assert_close((x.double() / s) @ (W.double() * s).T, x.double() @ W.double().T)


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_full_rank_layer_is_exact_up_to_bfloat16(layer, name):
    """With rank = full width the codes hold only the rounding error of bfloat16 (under 1 %)."""
    W, x = layer
    ones = InputTransform.smoothing(torch.ones(128, dtype=torch.bfloat16))
    factors = nearest_factors(W, ones, layer_spec(name, rank=48))
    reference = x @ W.T
    assert relative_error(low_rank_path(x, factors), reference) < 0.01
    assert relative_error(layer_output(x, factors, 1.0, 0), reference) < 0.003


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_smoothing_and_branch_beat_plain_rounding(layer, name):
    W, x = layer
    x_magnitude, w_magnitude = x[:256].abs().amax(0), W.abs().amax(0)
    held_out, reference = x[256:], x[256:] @ W.T

    def error(alpha: float, rank: int) -> float:
        smooth = smoothing_factor(x_magnitude, w_magnitude, alpha=alpha, beta=alpha)
        factors = nearest_factors(W, InputTransform.smoothing(smooth), layer_spec(name, rank))
        return relative_error(layer_output(held_out, factors, 1.0, 0), reference).item()

    assert error(0.5, 16) < 0.8 * error(0.0, 0)


ROTATIONS = [0, 32, 128]


def search(layer, exponents, rotations, name):
    W, x = layer
    mean = x.mean(0).bfloat16()
    return search_transform(W, x, x.std(0), mean, TransformCandidates(exponents, rotations), layer_spec(name))


def test_search_selects_the_smallest_error(layer):
    W, x = layer
    found = search(layer, CANDIDATES, ROTATIONS, "int4")
    assert len(found.errors) == len(CANDIDATES) and len(found.rotation_errors) == len(ROTATIONS)
    assert found.rotation_errors[0] == min(found.errors)
    assert (found.alpha, found.beta) == CANDIDATES[found.errors.index(min(found.errors))]
    assert found.transform.rotation == ROTATIONS[found.rotation_errors.index(min(found.rotation_errors))]
    assert torch.equal(
        found.transform.smooth, smoothing_factor(x.std(0), W.abs().amax(0), alpha=found.alpha, beta=found.beta)
    )
    assert torch.equal(found.transform.mean, x.mean(0).bfloat16())
    factors = nearest_factors(W, found.transform, layer_spec("int4"))
    assert torch.equal(factors.proj_down, found.proj_down) and torch.equal(factors.proj_up, found.proj_up)
    assert relative_error(layer_output(x, factors, 1.0, 0), x @ W.T).item() == min(found.rotation_errors)


def scripted_errors(monkeypatch, *errors):
    """The search finds these errors, in the order in which it tries candidates."""
    remaining = iter(errors)
    monkeypatch.setattr(smooth_module, "relative_error", lambda y, reference: torch.tensor(next(remaining)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_exponents_with_an_error_that_is_not_finite_are_never_selected(layer, monkeypatch, bad):
    scripted_errors(monkeypatch, bad, 0.5, 0.25, bad)
    found = search(layer, CANDIDATES, [0], "int4")
    assert (found.alpha, found.beta) == CANDIDATES[2]
    assert found.errors == (torch.inf, 0.5, 0.25, torch.inf)


def test_a_rotation_with_an_error_that_is_not_finite_is_never_selected(layer, monkeypatch):
    scripted_errors(monkeypatch, 0.5, torch.nan, 0.25)
    found = search(layer, CANDIDATES[:1], ROTATIONS, "int4")
    assert found.transform.rotation == ROTATIONS[2]


def test_search_without_a_finite_error_is_refused(layer):
    W, x = layer
    broken = x.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(UserError, match="none of 4 candidates has a finite output error.*stage capture"):
        search((W, broken), CANDIDATES, [0], "int4")


@pytest.mark.parametrize("name", ["int4", "mxfp4", "nvfp4"])
def test_another_candidate_never_raises_the_score(layer, name):
    more_exponents = [
        min(search(layer, CANDIDATES[:n], [0], name).rotation_errors) for n in range(1, len(CANDIDATES) + 1)
    ]
    more_rotations = [
        min(search(layer, CANDIDATES[:2], ROTATIONS[:n], name).rotation_errors) for n in range(1, len(ROTATIONS) + 1)
    ]
    for scores in (more_exponents, more_rotations):
        assert scores == sorted(scores, reverse=True)


def test_unquantized_activations(layer):
    W, x = layer
    fmt = get_format("int4")
    w4a16 = QuantScheme(
        weight=fmt, weight_rounding="ceil", activation=None, activation_rounding="ceil", activation_scales="absmax"
    )
    ones = InputTransform.smoothing(torch.ones(128, dtype=torch.bfloat16))
    factors = nearest_factors(W, ones, LayerSpec(0, 0, w4a16))
    torch.testing.assert_close(quantized_path(x, factors, 0.5, 0), x @ fmt.decode(factors.codes, factors.scales).T)


def test_with_both_exponents_zero_there_is_no_smoothing(layer):
    W, x = layer
    smooth = smoothing_factor(x.std(0), W.abs().amax(0), alpha=0, beta=0)
    assert torch.equal(smooth, torch.ones(x.shape[1], dtype=torch.bfloat16))
