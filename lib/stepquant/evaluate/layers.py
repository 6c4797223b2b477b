"""Error of the quantized layers, and its means.

Relative errors of different sites differ by orders of magnitude. The mean is geometric, so that halving the error of
any layer counts the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from stepquant.errors import UserError

Key = TypeVar("Key", int, str)


@dataclass(frozen=True)
class LayerError:
    """Relative error of one site of one block in one timestep bin, on held-out tokens.

    Attributes:
        expert: Name of the expert.
        block: Index of the transformer block.
        site: Name of the site.
        bin: Index of the timestep bin; None for a site that does not depend on t.
        error: ||Y_q - Y||_F / ||Y||_F of the layer's output (`stepquant.quantize.quantized_layer.relative_error`).
    """

    expert: str
    block: int
    site: str
    bin: int | None
    error: float


def geometric_mean(errors: Iterable[float]) -> float:
    """exp(mean(log e)); 0 if any error is 0.

    Raises:
        UserError: There is no error to average, or one is negative or not finite.
    """
    values = np.fromiter(errors, dtype=np.float64)
    if values.size == 0:
        raise UserError("no layer error to average: evaluate found no quantized site")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise UserError(f"a layer error is negative or not finite: {values[~(np.isfinite(values) & (values >= 0))][0]}")
    with np.errstate(divide="ignore"):  # log(0) = -inf gives the right mean, 0
        return float(np.exp(np.log(values).mean()))


def mean_by(records: Iterable[LayerError], key: Callable[[LayerError], Key | None]) -> dict[Key, float]:
    """Geometric mean of the errors per value of key(record), in ascending order; None is left out."""
    groups: dict[Key, list[float]] = {}
    for record in records:
        value = key(record)
        if value is not None:
            groups.setdefault(value, []).append(record.error)
    return {name: geometric_mean(groups[name]) for name in sorted(groups)}
