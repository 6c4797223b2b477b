"""Error of the quantized layers, and its means.

Relative errors spread over orders of magnitude between sites, so they are averaged geometrically: halving the error
of one layer then counts the same wherever it happens.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from stepquant.errors import UserError


@dataclass(frozen=True)
class LayerError:
    """Relative error of one site of one block in one timestep bin, on held-out tokens.

    bin is None at a site that does not depend on t. error is ||Y_q - Y||_F / ||Y||_F of the layer's output, see
    `stepquant.quantize.quantized_layer.relative_error`.
    """

    expert: str
    block: int
    site: str
    bin: int | None
    error: float


def geometric_mean(errors: Iterable[float]) -> float:
    """exp(mean(log e)); 0 if any error is 0. Raises UserError if there is none, or one is negative or not finite."""
    values = np.fromiter(errors, dtype=np.float64)
    if values.size == 0:
        raise UserError("no layer error to average: evaluate found no quantized site")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise UserError(f"a layer error is negative or not finite: {values[~(np.isfinite(values) & (values >= 0))][0]}")
    with np.errstate(divide="ignore"):  # log(0) = -inf gives the right mean, 0
        return float(np.exp(np.log(values).mean()))


def mean_by(records: Iterable[LayerError], key: Callable[[LayerError], Hashable]) -> dict:
    """Geometric mean of the errors per value of key(record), keys ascending; records whose key is None are left out."""
    groups: dict[Hashable, list[float]] = {}
    for record in records:
        if key(record) is not None:
            groups.setdefault(key(record), []).append(record.error)
    return {name: geometric_mean(groups[name]) for name in sorted(groups)}
