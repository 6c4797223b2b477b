"""Stage sensitivity without guidance and in bfloat16, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stages import trajectories
from stepquant import cli
from stepquant.calibration.sensitivity_files import read_products
from tests.stages.conftest import HIGH

ARTIFACT = Path("artifacts/sensitivity/high_noise")
MANY = "sensitivity.prompts: 2, but 1 calibration prompts are recorded; allowed: 1 to 1"


def test_without_guidance_and_in_bfloat16(folder):
    """One step of one prompt in one branch. Coarser arithmetic gives nearly the same error of the activations."""
    for stage in ("lowrank", "gptq", "clip", "sensitivity"):
        folder.finish(stage, *HIGH)
    exact = read_products(ARTIFACT)
    assert (exact.branches, tuple(exact.measured.prompts), exact.bin_edges) == (1, ("calibration_00",), (1000.0, 900.0))
    assert exact.measured.products.shape == (1, 1, 3, 2, 7, 64)
    folder.set("compute.dtype", "bfloat16")
    folder.finish("sensitivity", *HIGH)
    coarse = read_products(ARTIFACT)
    assert not torch.equal(coarse.measured.products, exact.measured.products)
    squares = [found.measured.products[0, 0, 0].square().sum() for found in (exact, coarse)]
    assert torch.allclose(*squares, rtol=0.1)


def test_more_prompts_than_are_recorded(folder, refused, monkeypatch):
    """By check and by trajectories, before anything is sampled; by sensitivity, if fewer are recorded by now."""
    folder.set("sensitivity.prompts", 2)
    monkeypatch.setattr(trajectories, "source_pipeline", None)
    shutil.rmtree(folder.root / ".units/trajectories")
    assert refused("trajectories") == refused("sensitivity", *HIGH) == MANY
    for section, place in (("trajectories", "data/calibration"), ("generate", "data/evaluation")):
        shutil.copytree("data/prompts", place)  # where DVC watches prompts
        folder.set(f"{section}.manifest", f"{place}/manifest.jsonl")
    checked = CliRunner().invoke(cli.app, ["check"])
    assert (checked.exit_code, checked.stderr) == (2, f"error: {MANY}\n")


@pytest.mark.parametrize("key", ["prompts", "probes", "steps_per_bin"])
def test_nothing_to_measure(folder, refused, key):
    folder.set(f"sensitivity.{key}", 0)
    assert refused("sensitivity", *HIGH).startswith(f"params.yaml: sensitivity.{key}: ")


@pytest.mark.parametrize("value", [-0.1, 1.5, "a tenth"])
def test_a_budget_that_is_no_share(folder, refused, value):
    folder.set("precision.activation_budget", value)
    assert refused("schedule").startswith("params.yaml: precision.activation_budget: ")


def test_artifacts_that_are_not_there(refused):
    assert refused("sensitivity", *HIGH).startswith("artifacts/lowrank/high_noise/manifest.json: not there; run")
    assert refused("schedule").startswith("artifacts/sensitivity/high_noise/manifest.json: not there; run")
