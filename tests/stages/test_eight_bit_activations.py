"""Activations that have 8 bits in every bin leave nothing to schedule: a budget is refused before any work."""

import pytest

from tests.stages.conftest import HIGH


@pytest.mark.parametrize(("stage", "arguments"), [("lowrank", HIGH), ("sensitivity", HIGH), ("schedule", ())])
def test_a_budget_beside_eight_bit_activations(folder, refused, stage, arguments):
    folder.set("format.activation", "int8_row")
    folder.set("precision.activation_budget", 0.1)
    assert refused(stage, *arguments) == (
        "params.yaml: precision.activation_budget: found 0.1; int8_row activations have 8 bits in every timestep bin "
        "(target.program: stepquant); allowed with them: 0"
    )
