"""Means over videos, with an interval that says how far to trust them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stepquant.errors import UserError


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: number of resampled means, confidence (0.95 is a 95 % interval), seed of the resampling."""

    samples: int
    confidence: float
    seed: int


def interval(values: Mapping[str, float], bootstrap: Bootstrap) -> dict[str, float]:
    """Mean over videos and its percentile bootstrap interval, {"mean", "low", "high"}, from {video id: value}.

    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979; percentile interval. Ids are
    drawn in sorted order from a seeded generator, so every variant sees the same resamples. Raises UserError if empty.
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
    """`interval` of value - reference per video: the difference between two variants on the same prompts and noise.

    Pairing removes the spread between videos, which is far larger than what quantization does to one of them.
    Raises UserError if the two do not hold the same ids.
    """
    if values.keys() != reference.keys():
        missing = sorted(values.keys() ^ reference.keys())
        raise UserError(
            f"videos {missing} exist for one of the two variants only: generate both from the same manifest"
        )
    return interval({name: values[name] - reference[name] for name in values}, bootstrap)
