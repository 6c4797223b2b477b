"""Gradient-refined smoothing: it lowers the expected noise, and is kept only if the output error falls."""

from dataclasses import replace

import pytest
import torch

from stepquant.errors import UserError
from stepquant.quantize.quantized_layer import layer_output, relative_error
from stepquant.quantize.rotate import rotate
from stepquant.quantize.smooth import TransformCandidates, round_to_nearest, search_transform
from stepquant.quantize.smooth_gradient import descend_smoothing, refine_smoothing
from stepquant.quantize.transform import InputTransform
from tests.quantize.scheme import layer_spec, scheme

FORMATS = ["int4", "mxfp4", "nvfp4"]


@pytest.fixture
def case(make_layer):
    """W, search tokens, held-out tokens, and the result of the search, by format."""
    W, x = make_layer(seed=6, rows=96, channels=256, tokens=2048)
    search, held_out = x[:1024], x[1024:]
    nothing = torch.zeros(256, dtype=torch.bfloat16)

    def found(name: str, rotation: int = 0):
        magnitude = search.square().mean(0).sqrt()
        candidates = TransformCandidates([(0.5, 0.5)], [rotation])
        return search_transform(W, search, magnitude, nothing, candidates, layer_spec(name))

    return W, search, held_out, found


def expected_noise(rest, x, transform, group) -> float:
    """By the definition: squared absmax per token and group, times the squared weights of the group; float64."""
    z = rotate(x / transform.smooth.float(), transform.rotation).double().unflatten(-1, (-1, group))
    R = rotate(rest * transform.smooth.float(), transform.rotation).double().unflatten(-1, (-1, group))
    weights = R.square().sum((0, 2))
    return ((z.abs().amax(-1).square().mean(0) + z.square().mean((0, 2))) * weights).sum().item()


@pytest.mark.parametrize(("group", "rotation"), [(16, 0), (64, 0), (32, 64), (64, 32)])
def test_the_expected_noise_falls(case, group, rotation):
    W, search, held_out, found = case
    before = found("int4", rotation).transform
    smooth = descend_smoothing(W, search, before, group, steps=30)
    assert smooth.dtype == torch.bfloat16
    assert expected_noise(W, held_out, replace(before, smooth=smooth), group) < 0.99 * expected_noise(
        W, held_out, before, group
    )


@pytest.mark.parametrize("name", FORMATS)
def test_the_held_out_error_falls(case, name):
    W, search, held_out, found = case
    before = found(name)
    after = refine_smoothing(W, search[:512], search[512:], before, layer_spec(name), steps=30)
    errors = []
    for search_result in (before, after):
        layer = round_to_nearest(
            W, search_result.transform, search_result.proj_down, search_result.proj_up, scheme(name)
        )
        errors.append(relative_error(layer_output(held_out, layer, 1.0, 0), held_out @ W.T).item())
    assert errors[1] < errors[0]
    assert after.learned and not before.learned


def test_smoothing_that_does_not_help_other_tokens_is_not_kept(case):
    """Refined on tokens in which some channels are nearly zero, and scored on tokens in which they are the largest."""
    W, search, _, found = case
    before, small, large = found("int4"), search.clone(), search.clone()
    small[:, 10:26], large[:, 10:26] = 1e-3 * small[:, 10:26], 30 * large[:, 10:26]
    assert refine_smoothing(W, small, large, before, layer_spec("int4"), steps=30) is before


@pytest.mark.parametrize("size", [0.0, 1e6])
def test_a_group_of_zeros_or_huge_values_gives_finite_factors(case, size):
    W, search, _, found = case
    before, x = found("nvfp4").transform, search.clone()
    x[:, :16] *= size
    smooth = descend_smoothing(W, x, before, 16, steps=5)
    assert smooth.isfinite().all() and not torch.equal(smooth, before.smooth)


def test_zero_steps_change_nothing(case):
    W, search, _, found = case
    before = found("nvfp4")
    assert refine_smoothing(W, search, search, before, layer_spec("nvfp4"), steps=0) is before


def test_same_input_same_bits(case):
    W, search, _, found = case
    before: InputTransform = found("int4", 64).transform
    assert torch.equal(
        descend_smoothing(W, search, before, 64, steps=5), descend_smoothing(W, search, before, 64, steps=5)
    )


def test_activations_that_stay_unquantized_are_refused(case):
    W, search, _, found = case
    spec = replace(layer_spec("int4"), scheme=replace(scheme("int4"), activation=None))
    with pytest.raises(UserError, match="activations stay unquantized"):
        refine_smoothing(W, search, search, found("int4"), spec, steps=1)


def test_smoothing_with_a_nan_error_is_not_kept(case):
    W, search, _, found = case
    before, broken = found("int4"), search.clone()
    broken[0, 0] = torch.nan
    assert refine_smoothing(W, search, broken, before, layer_spec("int4"), steps=1) is before
