"""Timestep bins: intervals of t inside one expert's range.

Bins are defined by t and not by step index, so a noise level belongs to the same bin for every step count and shift.
Index 0 is the noisiest bin, which a sampler reaches first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepquant.errors import UserError


@dataclass(frozen=True)
class Bins:
    """Bins of one expert.

    Attributes:
        edges: strictly falling timesteps. Bin i contains t with edges[i] >= t > edges[i + 1]; the last bin also
            contains the lowest edge, so every t in [edges[-1], edges[0]] has a bin.
    """

    edges: tuple[float, ...]

    @property
    def count(self) -> int:
        """Number of bins."""
        return len(self.edges) - 1

    def index(self, t: float) -> int:
        """Index of the bin of timestep t. Raises UserError if t is outside the range of the bins, or NaN."""
        if not self.edges[-1] <= t <= self.edges[0]:
            raise UserError(f"timestep {t} is outside the bins' range [{self.edges[-1]}, {self.edges[0]}]")
        inner = self.edges[1:-1]
        return sum(t <= edge for edge in inner)


def make_bins(spec: int | Sequence[float], low: float, high: float, key: str) -> Bins:
    """Make the bins of an expert.

    Args:
        spec: a number of bins of equal width in t, or explicit edges in rising or falling order.
        low: lowest timestep of the expert.
        high: highest timestep of the expert.
        key: the params key that an error message names.

    Returns:
        Bins that cover [low, high].

    Raises:
        UserError: the count is below 1, or the edges are not strictly ordered or do not cover the range.
    """
    if isinstance(spec, int):
        if spec < 1:
            raise UserError(f"{key}: {spec} bins; allowed: a count of at least 1, or a list of edges in t")
        width = (high - low) / spec
        return Bins(tuple(high - i * width for i in range(spec)) + (low,))
    edges = [float(e) for e in spec]
    if edges == sorted(edges):
        edges = edges[::-1]
    if len(edges) < 2 or any(a <= b for a, b in zip(edges, edges[1:])):
        raise UserError(
            f"{key}: edges {list(spec)} overlap or repeat; allowed: at least two strictly ordered values of t"
        )
    if edges[0] < high or edges[-1] > low:
        raise UserError(
            f"{key}: edges {list(spec)} do not cover [{low:g}, {high:g}]; allowed: first and last edge at or beyond it"
        )
    return Bins(tuple(edges))


def expert_bins(specs: Mapping[str, int | Sequence[float]], expert: str, t_range: tuple[float, float]) -> Bins:
    """Make the bins of an expert from the params section `bins`.

    Args:
        specs: counts or edges by expert.
        expert: name of the expert.
        t_range: (lowest, highest) timestep of the expert.

    Raises:
        UserError: the section lacks the expert, or its bins are invalid (see `make_bins`).
    """
    if expert not in specs:
        raise UserError(f"params: missing key 'bins.{expert}'")
    return make_bins(specs[expert], *t_range, f"bins.{expert}")
