"""Spends a budget of 8-bit activations where rounding errors reach the video.

A slot is a site of a block in a timestep bin of an expert. The error of the final latent is, to first order, the sum
of the errors of all denoiser outputs, each times what the sampler makes of that output (models/sampler_response.py).
Errors of one slot in several steps are added with their signs, since the same site reads nearly the same input there.
Errors of different slots, and of different groups of tokens, are taken as independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.errors import InvalidInput

# The errors that are told apart, in the order in which they are stored (quantize/error_products.py).
ERRORS = ("activations", "activations_8_bit", "weights")

Slot = tuple[str, int, int, int]  # expert, bin, block, site


@dataclass(frozen=True)
class MeasuredProducts:
    """The products of some steps of an expert.

    Attributes:
        prompts: of each step.
        t: of each step.
        bins: of each step.
        products: float32 [steps, probes, errors, blocks, sites, groups].
    """

    prompts: Sequence[str]
    t: Sequence[float]
    bins: Sequence[int]
    products: Tensor


@dataclass(frozen=True)
class SampledStep:
    """A step of the sampler that an expert takes.

    Attributes:
        t: timestep.
        bin: its bin.
        response: derivative of the final latent by the output of the step.
    """

    t: float
    bin: int
    response: float


def squared_errors(measured: MeasuredProducts, sampled: Sequence[SampledStep], bins: int) -> Tensor:
    """What each slot adds to the squared error of the final latent, summed over its entries.

    A step that was not measured has the products of the measured step of its bin with the nearest t.

    Args:
        measured: of an expert.
        sampled: all steps that the expert takes.
        bins: number of its bins.

    Returns:
        float64 [errors, bins, blocks, sites], the mean over prompts and probes.

    Raises:
        InvalidInput: a step lies in a bin in which nothing was measured.
    """
    _, _, errors, blocks, sites, _ = measured.products.shape
    prompts = list(dict.fromkeys(measured.prompts))
    found = torch.zeros(errors, bins, blocks, sites, dtype=torch.float64)
    for prompt in prompts:
        changes = torch.zeros(bins, *measured.products.shape[1:], dtype=torch.float64)
        for step in sampled:
            own = [n for n, of in enumerate(measured.prompts) if of == prompt and measured.bins[n] == step.bin]
            if not own:
                raise InvalidInput(f"sensitivity: nothing was measured in bin {step.bin}, which t = {step.t:g} reaches")
            nearest = min(own, key=lambda n: abs(measured.t[n] - step.t))
            changes[step.bin] += step.response * measured.products[nearest].double()
        found += changes.square().sum(-1).mean(1).transpose(0, 1)
    return found / len(prompts)


@dataclass(frozen=True)
class Choice:
    """One slot, and what 8-bit activations in it are worth.

    Attributes:
        slot: expert, bin, block and site.
        gain: what they take off the squared error of the final latent.
        cost: multiply-adds of a sampled video that it holds.
    """

    slot: Slot
    gain: float
    cost: float


def spend(choices: Sequence[Choice], budget: float) -> list[Slot]:
    """The slots that take 8-bit activations.

    In the order of gain per cost, each that still fits. With many small slots that is within one slot of the optimum of
    this knapsack problem (Dantzig, "Discrete-Variable Extremum Problems", 1957).

    Args:
        choices: all slots.
        budget: share of the cost of all slots, 0 to 1.

    Returns:
        The slots, sorted. A slot that gains nothing is left out.
    """
    left = budget * sum(choice.cost for choice in choices)
    taken = []
    gaining = (choice for choice in choices if choice.gain > 0)  # no step may reach a bin, which then costs nothing
    for choice in sorted(gaining, key=lambda choice: (-choice.gain / choice.cost, choice.slot)):
        # A budget that is just a sum of costs must not lose its last slot to the rounding of that sum.
        if choice.cost <= left * (1 + 1e-9):
            taken.append(choice.slot)
            left -= choice.cost
    return sorted(taken)


def choices(expert: str, errors: Tensor, costs: Tensor) -> list[Choice]:
    """All slots of an expert.

    Args:
        expert: its name.
        errors: [errors, bins, blocks, sites] from `squared_errors`.
        costs: [bins, blocks, sites].
    """
    activations, in_eight_bits, _ = errors
    gains = activations - in_eight_bits
    return [
        Choice((expert, *index), gains[index].item(), costs[index].item())
        for index in map(tuple, torch.cartesian_prod(*map(torch.arange, gains.shape)).tolist())
    ]
