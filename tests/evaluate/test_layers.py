import math

import pytest

from stepquant.errors import UserError
from stepquant.evaluate.layers import LayerError, geometric_mean, mean_by

ERRORS = [
    LayerError("low_noise", 0, "attn1.qkv", 0, 0.1),
    LayerError("low_noise", 0, "attn1.qkv", 1, 0.4),
    LayerError("low_noise", 1, "attn2.kv", None, 0.9),
]


def test_geometric_mean_by_hand():
    assert geometric_mean([0.1, 0.4]) == pytest.approx(0.2)  # sqrt(0.1 * 0.4)
    assert geometric_mean([1, 10, 100]) == pytest.approx(10)
    assert geometric_mean([0.0, 0.5]) == 0


@pytest.mark.parametrize("errors, message", [([], "no layer error"), ([0.1, math.nan], "nan"), ([-0.1], "negative")])
def test_what_has_no_geometric_mean(errors, message):
    with pytest.raises(UserError, match=message):
        geometric_mean(errors)


def test_means_by_group():
    assert mean_by(ERRORS, lambda e: e.site) == pytest.approx({"attn1.qkv": 0.2, "attn2.kv": 0.9})
    assert mean_by(ERRORS, lambda e: e.block) == pytest.approx({0: 0.2, 1: 0.9})


def test_a_site_without_bin_is_in_no_bin():
    assert mean_by(ERRORS, lambda e: e.bin) == pytest.approx({0: 0.1, 1: 0.4})
