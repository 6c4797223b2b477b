"""Slots under a budget: errors by hand, and the choice against all subsets."""

from itertools import combinations

import pytest
import torch

from stepquant.errors import InvalidInput
from stepquant.recipe.precision import Choice, MeasuredProducts, SampledStep, choices, spend, squared_errors


def test_errors_add_with_their_signs_in_a_slot_and_as_squares_elsewhere():
    """Two prompts, one of which has two measured steps in bin 0; one probe, error, block and site; two groups."""
    products = torch.tensor([[1.0, 2.0], [3.0, -1.0], [7.0, 7.0], [5.0, 4.0], [2.0, 1.0]]).view(5, 1, 1, 1, 1, 2)
    measured = MeasuredProducts(("a", "a", "a", "b", "b"), (900, 800, 200, 850, 300), (0, 0, 1, 0, 1), products)
    sampled = [
        SampledStep(910, 0, -0.1),
        SampledStep(890, 0, -0.2),
        SampledStep(790, 0, -0.3),
        SampledStep(250, 1, 0.5),
    ]
    # Bin 0 of prompt a: 910 and 890 are nearest to 900, 790 to 800. Prompt b has 850 alone.
    a = [-0.3 * 1 - 0.3 * 3, -0.3 * 2 - 0.3 * -1]
    b = [-0.6 * 5, -0.6 * 4]
    expected = [
        (sum(value**2 for value in a) + sum(value**2 for value in b)) / 2,
        (2 * 3.5**2 + (0.5 * 2) ** 2 + (0.5 * 1) ** 2) / 2,
    ]
    found = squared_errors(measured, sampled, bins=2)
    assert found.shape == (1, 2, 1, 1)
    assert found.flatten().tolist() == pytest.approx(expected)


def test_probes_are_averaged():
    products = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1, 1)
    found = squared_errors(MeasuredProducts(("a",), (5,), (0,), products), [SampledStep(5, 0, 2.0)], bins=1)
    assert found.item() == (4 * 1 + 4 * 9) / 2


def made(costs, seed):
    gains = torch.rand(len(costs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Choice(("e", 0, 0, n), gain, cost) for n, (gain, cost) in enumerate(zip(gains, costs))]


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.35, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_equal_costs_give_the_best_subset(budget, seed):
    slots = made([1.0] * 8, seed)
    best = max(
        (sum(slot.gain for slot in taken), sorted(slot.slot for slot in taken))
        for count in range(9)
        for taken in combinations(slots, count)
        if count <= 8 * budget
    )[1]
    assert spend(slots, budget) == best


@pytest.mark.parametrize("seed", range(5))
def test_unequal_costs_are_within_one_slot_of_the_best_subset(seed):
    slots, budget = made([3.0, 1.0, 4.0, 1.5, 2.0, 6.0, 5.0], seed), 0.4
    left = budget * sum(slot.cost for slot in slots)
    taken = [slot for slot in slots if slot.slot in spend(slots, budget)]
    assert sum(slot.cost for slot in taken) <= left
    best = max(
        sum(slot.gain for slot in subset)
        for count in range(8)
        for subset in combinations(slots, count)
        if sum(slot.cost for slot in subset) <= left
    )
    assert sum(slot.gain for slot in taken) >= best - max(slot.gain for slot in slots)


def test_a_slot_that_gains_nothing_is_left_out():
    assert spend([Choice(("e", 0, 0, 0), -1.0, 1.0), Choice(("e", 0, 0, 1), 2.0, 1.0)], 1.0) == [("e", 0, 0, 1)]


def test_a_bin_that_no_step_reaches_costs_and_gains_nothing():
    assert spend([Choice(("e", 0, 0, 0), 0.0, 0.0), Choice(("e", 1, 0, 0), 2.0, 1.0)], 1.0) == [("e", 1, 0, 0)]


def test_a_bin_without_a_measured_step_is_refused():
    measured = MeasuredProducts(("a",), (900,), (0,), torch.ones(1, 1, 1, 1, 1, 1))
    with pytest.raises(InvalidInput, match="nothing was measured in bin 1, which t = 300 reaches"):
        squared_errors(measured, [SampledStep(300, 1, 0.5)], bins=2)


def test_a_budget_that_is_a_sum_of_costs_buys_all_of_it():
    """0.1 + 0.2 is more than 0.3 in floating point."""
    slots = [Choice(("e", 0, 0, n), 1.0, cost) for n, cost in enumerate((0.1, 0.2, 0.7))]
    assert spend(slots, 0.3) == [("e", 0, 0, 0), ("e", 0, 0, 1)]


def test_choices_are_gains_of_eight_bits():
    """Two bins, one block, two sites: 4-bit errors minus 8-bit errors, whatever the weights do."""
    errors = torch.tensor([[[[4.0, 3.0]], [[2.0, 8.0]]], [[[1.0, 0.5]], [[0.0, 0.0]]], [[[9.0, 9.0]], [[9.0, 9.0]]]])
    costs = torch.tensor([[[10.0, 20.0]], [[30.0, 60.0]]])
    assert choices("low", errors, costs) == [
        Choice(("low", 0, 0, 0), 3.0, 10.0),
        Choice(("low", 0, 0, 1), 2.5, 20.0),
        Choice(("low", 1, 0, 0), 2.0, 30.0),
        Choice(("low", 1, 0, 1), 8.0, 60.0),
    ]
