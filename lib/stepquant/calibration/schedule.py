"""Makes the precision schedule of a model from the measured products of its experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepquant.calibration.sensitivity_files import ExpertProducts
from stepquant.formats import eight_bit_partner, get_format
from stepquant.models.checks.reach import steps_of
from stepquant.models.checks.scheduler import sampler_timesteps
from stepquant.models.manifest import ExpertManifest, ModelManifest
from stepquant.models.sampler_response import sampler_response
from stepquant.params import Format, Precision, Sampling
from stepquant.recipe.precision import ERRORS, SampledStep, Slot, choices, spend, squared_errors
from stepquant.recipe.schedule_file import ExpertSchedule, Schedule


def make_schedule(
    manifest: ModelManifest,
    scheduler: Mapping[str, Any],
    sampling: Sampling,
    formats: Format,
    precision: Precision,
    products: Mapping[str, ExpertProducts],
) -> Schedule:
    """Spend the budget.

    Args:
        manifest: the source model.
        scheduler: scheduler_config.json of the pipeline.
        sampling: how videos are sampled; need not be as the products were recorded.
        formats: the formats.
        precision: the budget.
        products: of every expert, by name.

    Raises:
        UserError: the scheduler is not linear, or no step was measured in a bin that it reaches.
    """
    taken = sampled_steps(manifest, scheduler, sampling, products)
    errors = {name: squared_errors(found.measured, taken[name], found.bins.count) for name, found in products.items()}
    costs = {name: slot_costs(manifest.expert(name), found, taken[name]) for name, found in products.items()}
    slots = [choice for name in products for choice in choices(name, errors[name], costs[name])]
    chosen = set(spend(slots, precision.activation_budget))
    held = sum(choice.cost for choice in slots if choice.slot in chosen)
    partner = eight_bit_partner(get_format(formats.activation))
    return Schedule(
        eight_bit_format=partner.name,
        budget=precision.activation_budget,
        share=held / sum(choice.cost for choice in slots),
        experts={
            name: _expert_schedule(manifest.expert(name), found, errors[name], costs[name], chosen, name)
            for name, found in products.items()
        },
    )


def sampled_steps(
    manifest: ModelManifest,
    scheduler: Mapping[str, Any],
    sampling: Sampling,
    products: Mapping[str, ExpertProducts],
) -> dict[str, list[SampledStep]]:
    """The steps that each expert takes, by name. Arguments and errors as those of `make_schedule`."""
    t = sampler_timesteps(scheduler, sampling.steps, sampling.flow_shift)
    final = sampler_response(scheduler, sampling.steps, sampling.flow_shift).outputs[-1].tolist()
    highest = max(described.t_range[1] for described in manifest.experts.values())
    found = {}
    for name, measured in products.items():
        own = set(steps_of(t, manifest.expert(name).t_range, highest))
        found[name] = [SampledStep(at, measured.bins.index(at), by) for at, by in zip(t, final) if at in own]
    return found


def slot_costs(expert: ExpertManifest, measured: ExpertProducts, sampled: Sequence[SampledStep]) -> Tensor:
    """Multiply-adds of each slot in a sampled video, float64 [bins, blocks, sites]."""
    per_call = torch.tensor(
        [float(site.rows * site.columns * measured.tokens[name]) for name, site in expert.sites.items()],
        dtype=torch.float64,
    )
    bins = [step.bin for step in sampled]
    calls = torch.tensor([bins.count(b) * measured.branches for b in range(measured.bins.count)], dtype=torch.float64)
    return (calls[:, None] * per_call)[:, None].expand(-1, expert.blocks, -1)


def _expert_schedule(
    expert: ExpertManifest, found: ExpertProducts, errors: Tensor, costs: Tensor, chosen: set[Slot], name: str
) -> ExpertSchedule:
    sites = list(expert.sites)
    eight_bit: dict[int, dict[str, list[int]]] = {}
    for _, b, block, site in sorted(slot for slot in chosen if slot[0] == name):
        eight_bit.setdefault(block, {}).setdefault(sites[site], []).append(b)
    return ExpertSchedule(
        bin_edges=list(found.bin_edges),
        sites=sites,
        eight_bit=eight_bit,
        errors=dict(zip(ERRORS, errors.tolist())),
        cost=costs[:, 0].tolist(),
    )
