"""Clipping search: errors by the definition, ties, and how bins are pooled."""

import pytest
import torch

from stepquant.errors import UserError
from stepquant.formats import get_format
from stepquant.quantize.clip import ClipCandidate, ClipChoice, choose_clip, clip_candidates, clip_errors
from stepquant.quantize.quantized_layer import LayerSpec, QuantScheme, layer_output, relative_error
from stepquant.quantize.smooth import nearest_factors, smoothing_factor
from stepquant.quantize.transform import InputTransform

FORMATS = ["int4", "mxfp4", "nvfp4"]


def factors_of(W, x, name):
    fmt = get_format(name)
    smooth = smoothing_factor(x.abs().amax(0), W.abs().amax(0), alpha=0.5, beta=0.5)
    scheme = QuantScheme(
        weight=fmt, weight_rounding="floor", activation=fmt, activation_rounding="ceil", activation_scales="absmax"
    )
    return nearest_factors(W, InputTransform.smoothing(smooth), LayerSpec(8, 0, scheme))


def test_only_mxfp4_has_exponents_to_offset():
    pairs = [(c.ratio, c.exponent_offset) for c in clip_candidates([1.0, 0.8], [0, -1], get_format("mxfp4"))]
    assert pairs == [(1.0, 0), (1.0, -1), (0.8, 0), (0.8, -1)]
    for name in ("int4", "nvfp4"):
        candidates = clip_candidates([1.0, 0.8], [0, -1], get_format(name))
        assert candidates == [ClipCandidate(1.0, 0), ClipCandidate(0.8, 0)]


@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_those_of_the_layer(layer, name):
    W, x = layer
    factors, reference = factors_of(W, x, name), x @ W.T
    candidates = clip_candidates([1.0, 0.7], [0, 1], get_format(name))
    (errors,) = clip_errors([x], W, factors, candidates)
    for error, candidate in zip(errors, candidates, strict=True):
        y = layer_output(x, factors, candidate.ratio, candidate.exponent_offset)
        torch.testing.assert_close(error, torch.linalg.norm(y - reference) / torch.linalg.norm(reference))
    assert errors.unique().numel() == len(candidates)


def test_choice_per_bin_and_over_all_bins():
    # Mean squares: (.01 + .25)/2, (.04 + .04)/2, (.09 + .01)/2: the second is best for both bins together.
    errors = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.2, 0.1]])
    choice = choose_clip(errors)
    assert choice.per_bin == (0, 2)
    assert choice.single == 1


def test_one_bin_has_one_clip(layer):
    W, x = layer
    candidates = clip_candidates([1.0, 0.9, 0.8], [0], get_format("int4"))
    choice = choose_clip(clip_errors([x], W, factors_of(W, x, "int4"), candidates))
    assert choice.per_bin == (choice.single,)


def test_of_equal_candidates_the_first_wins():
    choice = choose_clip(torch.tensor([[0.3, 0.2, 0.2], [0.1, 0.1, 0.1]]))
    assert choice.per_bin == (1, 0)
    assert choice.single == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_error_that_is_not_finite_is_never_chosen(bad):
    choice = choose_clip(torch.tensor([[bad, 0.2, 0.1], [0.2, 0.4, 0.3]]))
    # Of the candidates that are finite in both bins: (.04 + .16)/2 and (.01 + .09)/2.
    assert choice == ClipChoice(per_bin=(2, 0), single=2)


def test_a_bin_without_a_finite_error_is_refused():
    errors = torch.tensor([[0.1, 0.2], [torch.nan, torch.inf]])
    with pytest.raises(UserError, match="none of 2 candidates has a finite output error in timestep bin 1.*capture"):
        choose_clip(errors)


def test_candidates_that_fail_in_one_bin_each_are_refused():
    with pytest.raises(UserError, match="all timestep bins together"):
        choose_clip(torch.tensor([[torch.nan, 0.1], [0.1, torch.nan]]))


def test_per_bin_is_never_worse_than_single(layer):
    W, x = layer
    factors = factors_of(W, x, "mxfp4")
    candidates = clip_candidates([1.0, 0.9, 0.8, 0.7], [0, -1], get_format("mxfp4"))
    bins = (x[:100], 7 * x[100:200], x[200:].tanh())
    errors = clip_errors(bins, W, factors, candidates)
    choice = choose_clip(errors)
    for bin_errors, best in zip(errors, choice.per_bin, strict=True):
        assert bin_errors[best] <= bin_errors[choice.single]


def test_relative_error():
    # ||(3, 4)|| / ||(6, 8)|| = 5 / 10
    assert relative_error(torch.tensor([9.0, 12.0]), torch.tensor([6.0, 8.0])) == 0.5
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
