import numpy as np
import pytest

from stepquant.errors import UserError
from stepquant.evaluate.summary import Bootstrap, interval, paired_difference

BOOTSTRAP = Bootstrap(samples=4000, confidence=0.95, seed=0)


def named(values) -> dict[str, float]:
    return {f"video_{i:04d}": float(value) for i, value in enumerate(values)}


def test_large_samples_give_the_normal_interval():
    # Central limit: the mean of n values lies in mean +- 1.95996 s / sqrt(n) with 95 %, and in +- 1.64485 with 90 %.
    x = np.random.default_rng(1).normal(30, 4, size=2000)
    standard_error = x.std() / np.sqrt(len(x))
    for confidence, z in ((0.95, 1.95996), (0.90, 1.64485)):
        found = interval(named(x), Bootstrap(4000, confidence, seed=0))
        assert found["mean"] == pytest.approx(x.mean())
        assert found["low"] == pytest.approx(x.mean() - z * standard_error, abs=0.1 * standard_error)
        assert found["high"] == pytest.approx(x.mean() + z * standard_error, abs=0.1 * standard_error)


def test_two_values_by_hand():
    # Resamples of {0, 1} have means 0, 1/2, 1 with probability 1/4, 1/2, 1/4: the 95 % interval is all of [0, 1],
    # the 40 % interval is cut at 30 % and 70 %, inside the middle half.
    assert interval(named([0, 1]), BOOTSTRAP) == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert interval(named([0, 1]), Bootstrap(4000, 0.4, 0)) == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_one_video_has_no_spread():
    assert interval({"a": 3.0}, BOOTSTRAP) == {"mean": 3.0, "low": 3.0, "high": 3.0}


def test_seed_and_not_the_order_of_ids_decides():
    values = named(np.random.default_rng(2).normal(size=10))
    assert interval(values, BOOTSTRAP) == interval(dict(reversed(values.items())), BOOTSTRAP)
    assert interval(values, BOOTSTRAP) != interval(values, Bootstrap(4000, 0.95, seed=1))


def test_pairing_removes_the_spread_between_videos():
    bf16 = named(np.random.default_rng(3).normal(0, 100, size=50))
    worse = {name: value - 2 for name, value in bf16.items()}
    assert paired_difference(worse, bf16, BOOTSTRAP) == pytest.approx({"mean": -2, "low": -2, "high": -2})


def test_pairs_must_be_complete():
    with pytest.raises(UserError, match=r"\['b', 'c'\]"):
        paired_difference({"a": 1, "b": 2}, {"a": 1, "c": 2}, BOOTSTRAP)
    with pytest.raises(UserError, match="no video"):
        interval({}, BOOTSTRAP)
