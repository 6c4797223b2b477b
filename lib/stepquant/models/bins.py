"""Timestep bins: intervals of t inside one expert's range.

Bins are defined by t, never by step index, so that another step count or shift puts the same noise level into the
same bin. Index 0 is the noisiest bin, the one a sampler visits first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepquant.errors import UserError


@dataclass(frozen=True)
class Bins:
    """Bins of one expert, by edges that fall from the noisiest t: bin i holds edges[i] >= t > edges[i + 1].

    The lowest edge is inclusive as well, so every t of the expert's range [edges[-1], edges[0]] has a bin.
    """

    edges: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.edges) - 1

    def index(self, t: float) -> int:
        """Bin of timestep t (in 0..num_train_timesteps). Raises UserError if t is outside the expert's range."""
        if not self.edges[-1] <= t <= self.edges[0]:
            raise UserError(f"timestep {t} is outside the bins' range [{self.edges[-1]}, {self.edges[0]}]")
        inner = self.edges[1:-1]
        return sum(t <= edge for edge in inner)


def make_bins(spec: int | Sequence[float], low: float, high: float, key: str) -> Bins:
    """Bins over [low, high] from a count (equal widths in t) or explicit edges (in either order).

    key is the params key an error names. Raises UserError if explicit edges overlap, leave a gap at an end or repeat.
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
    """One expert's bins over its range of t, from the params section `bins`. Raises UserError as `make_bins`, or if it has none."""
    if expert not in specs:
        raise UserError(f"params: missing key 'bins.{expert}'")
    return make_bins(specs[expert], *t_range, f"bins.{expert}")
