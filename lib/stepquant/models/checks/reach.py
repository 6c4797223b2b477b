"""Experts and bins of the parameters against those of the model, and against the steps that reach them."""

from collections.abc import Mapping, Sequence

from stepquant.errors import InvalidInput
from stepquant.models.bins import Bins, expert_bins
from stepquant.models.checks.scheduler import listed
from stepquant.params import Sampling

Specs = Mapping[str, int | Sequence[float]]


def check_experts(names: Sequence[str] | None, section: str, experts: Sequence[str]) -> None:
    """Refuse a params section whose keys are not the experts of the model.

    Args:
        names: keys of the section; None where a stage is not given it.
        section: `bins` or `experts`.
        experts: of the model.

    Raises:
        InvalidInput: names what there is and what there should be.
    """
    if names is not None and set(names) != set(experts):
        kind = f"the single expert {experts[0]}" if len(experts) == 1 else f"the experts {' and '.join(experts)}"
        raise InvalidInput(
            f"{section}: has {', '.join(sorted(names)) or 'no keys'}; this model has {kind}: "
            f"set {' and '.join(f'{section}.{name}' for name in experts)}, and nothing else"
        )


def steps_of(t: Sequence[float], t_range: tuple[float, float], highest: float) -> list[float]:
    """The timesteps of one expert: the pipelines compare t >= boundary, so the lower edge of a range belongs to it.

    Args:
        t: timesteps of all steps.
        t_range: (lowest, highest) t of the expert.
        highest: largest t of any expert, which belongs to the expert that ends there.
    """
    low, high = t_range
    return [value for value in t if low <= value < high or value == high == highest]


def check_reached(
    t: Sequence[float], experts: Mapping[str, tuple[float, float]], specs: Specs | None, sampling: Sampling
) -> None:
    """Refuse an expert or a bin that no step reaches: nothing could be calibrated there.

    Args:
        t: timesteps of all steps, from the scheduler.
        experts: (lowest, highest) t of each expert.
        specs: the params section `bins`; None looks at experts only.
        sampling: the params section, which the message names.

    Raises:
        InvalidInput: names the expert or the bin, the timesteps, and edges that would do.
    """
    highest = max(high for _, high in experts.values())
    how = f"with {sampling.steps} steps and flow_shift {sampling.flow_shift:g} t = {listed(t)}"
    if lost := [value for value in t if not 0 <= value <= highest]:
        raise InvalidInput(f"scheduler: t = {lost[0]:g} is outside 0 to {highest:g}")
    for name, t_range in experts.items():
        own = steps_of(t, t_range, highest)
        if not own:
            raise InvalidInput(
                f"sampling.steps: no step reaches the expert {name} ({t_range[0]:g} <= t <= {t_range[1]:g}); {how}; "
                f"use more steps, or a {'larger' if t_range[1] == highest else 'smaller'} sampling.flow_shift"
            )
        if specs is not None:
            _check_bins(expert_bins(specs, name, t_range), name, own, how)


def _check_bins(bins: Bins, expert: str, t: Sequence[float], how: str) -> None:
    reached = {bins.index(value) for value in t}
    empty = next((b for b in range(bins.count) if b not in reached), None)
    if empty is None:
        return
    low, high = bins.edges[empty + 1], bins.edges[empty]
    edges = ", ".join(f"{edge:g}" for edge in _reached_edges(bins, reached))
    raise InvalidInput(
        f"bins.{expert}: bin {empty} ({low:g}, {high:g}] has no step; {how}; use edges [{edges}], or more "
        "sampling.steps"
    )


def _reached_edges(bins: Bins, reached: set[int]) -> list[float]:
    """Edges without the empty bins: each joins the bin above it, the first ones the bin below them."""
    kept = sorted(reached)
    return [bins.edges[0], *(bins.edges[b] for b in kept[1:]), bins.edges[-1]]
