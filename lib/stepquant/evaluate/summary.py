"""Means over videos with bootstrap intervals."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stepquant.errors import UserError


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are computed.

    Attributes:
        samples: Number of resampled means.
        confidence: 0.95 gives a 95 % interval.
        seed: Seed of the resampling.
    """

    samples: int
    confidence: float
    seed: int


def interval(values: Mapping[str, float], bootstrap: Bootstrap) -> dict[str, float]:
    """Mean over videos and its percentile bootstrap interval.

    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979. Videos are resampled in the
    order of their ids by a seeded generator, so every variant has the same resamples.

    Args:
        values: Prompt id -> value.
        bootstrap: How the interval is computed.

    Returns:
        {"mean": ..., "low": ..., "high": ...}

    Raises:
        UserError: There is no value.
    """
    if not values:
        raise UserError("no video to summarize: the evaluation manifest and the generated videos share no id")
    x = np.array([values[name] for name in sorted(values)], dtype=np.float64)
    draws = np.random.default_rng(bootstrap.seed).integers(len(x), size=(bootstrap.samples, len(x)))
    tail = (1 - bootstrap.confidence) / 2
    low, high = np.quantile(x[draws].mean(axis=1), [tail, 1 - tail])
    return {"mean": float(x.mean()), "low": float(low), "high": float(high)}


def paired_difference(
    values: Mapping[str, float], reference: Mapping[str, float], bootstrap: Bootstrap
) -> dict[str, float]:
    """The `interval` of value - reference per video, between two variants on the same prompts and noise.

    Pairing removes the variation between videos, which is far larger than the effect of quantization.

    Raises:
        UserError: The two have different ids.
    """
    if values.keys() != reference.keys():
        missing = sorted(values.keys() ^ reference.keys())
        raise UserError(
            f"videos {missing} exist for one of the two variants only: generate both from the same manifest"
        )
    return interval({name: values[name] - reference[name] for name in values}, bootstrap)
