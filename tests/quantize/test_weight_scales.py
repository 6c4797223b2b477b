"""Scales by error: never worse than by absmax, and correct in cases computed by hand."""

import pytest
import torch

from stepquant.errors import UserError
from stepquant.formats import get_format, weight_scales
from stepquant.quantize.weight_scales import scales_by_error

FORMATS = ["int4", "mxfp4", "nvfp4"]


def group_errors(fmt, W, scales):
    return (fmt.decode(fmt.encode(W, scales), scales) - W).square().unflatten(1, (-1, fmt.group)).sum(-1)


@pytest.mark.parametrize("name", FORMATS)
def test_no_group_is_worse_and_the_whole_is_better(layer, name):
    W, _ = layer
    fmt = get_format(name)
    by_error, by_absmax = (
        group_errors(fmt, W, scales) for scales in (scales_by_error(fmt, W), weight_scales(fmt, W, rounding="ceil"))
    )
    assert (by_error <= by_absmax).all()
    assert by_error.sum() < 0.97 * by_absmax.sum()


def test_mxfp4_saturates_one_value_for_a_finer_scale():
    # Absmax 6.4 needs scale 2: 3.2 -> 3 loses 0.4^2, and 0.5 / 2 = 0.25 is a tie that goes to 0, losing 31 * 0.5^2.
    # Scale 1 saturates 6.4 at 6, which loses the same 0.4^2, and holds 0.5 exactly.
    W = torch.full((1, 32), 0.5)
    W[0, 0] = 6.4
    assert scales_by_error(get_format("mxfp4"), W).group.item() == 127
    # 31 zeros gain nothing from a finer scale: 8 is exact with scale 2 (code 4), and saturates at 6 with scale 1.
    W[0, 0], W[0, 1:] = 8.0, 0.0
    assert scales_by_error(get_format("mxfp4"), W).group.item() == 128


def test_nvfp4_maps_the_largest_value_to_four_where_that_fits():
    # With scale 1, 4.5 would be in the gap between 4 and 6; with scale 1.5, 6 and 4.5 are the elements 4 and 3.
    # A second group holds the tensor's absmax 2688 = 6 * 448, so that the tensor scale is 1.
    W = torch.zeros(1, 32)
    W[0, :8], W[0, 8:16], W[0, 16] = 6.0, 4.5, 2688.0
    fmt = get_format("nvfp4")
    scales = scales_by_error(fmt, W)
    assert scales.tensor.item() == 1.0
    assert scales.group[0].float().tolist() == [1.5, 448.0]
    assert torch.equal(fmt.decode(fmt.encode(W, scales), scales), W)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name):
    fmt, W = get_format(name), torch.zeros(2, 64)
    scales = scales_by_error(fmt, W)
    assert torch.equal(fmt.decode(fmt.encode(W, scales), scales), W)


def test_bad_weights_are_refused():
    with pytest.raises(UserError, match="weight"):
        scales_by_error(get_format("int4"), torch.full((1, 64), float("inf")))
    with pytest.raises(UserError, match="multiple of 64"):
        scales_by_error(get_format("int4"), torch.ones(1, 96))
