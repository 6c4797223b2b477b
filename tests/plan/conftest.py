"""A made shape with all its artifacts: every stage up to pack has run on it, in this process."""

import importlib
from pathlib import Path

import pytest
import torch

from benchmarks.make_shape import EXPERT, Calls, Shape, make_shape
from stages import _stage
from stepquant.plan.printing import make_workload
from stepquant.profiles import read_profiles

SHAPE = Shape(blocks=2, width=256, ffn=512, heads=2, text_dim=128)
CALLS = Calls(calibration=2, validation=1, heldout=1, steps=4, frames=2, height=8, width=8, text=32)
PARAMS = {
    "capture": {"search_tokens": 40, "heldout_tokens": 1000},
    "smooth": {"candidates": [0.5, 0.6]},
    "gptq": {"refits": 1},
    "sensitivity": {"prompts": 1},
}


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_shape(folder, SHAPE, CALLS, PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(_stage, "die_with_parent", lambda: None)  # pytest shall survive its parent
        for stage in ("model", "capture", "lowrank", "gptq", "clip", "sensitivity", "schedule"):
            run(stage, **({} if stage in ("model", "schedule") else {"expert": EXPERT}))
        run("pack", variant="full")
    torch.set_grad_enabled(True)
    return folder


def run(stage: str, **arguments: str) -> None:
    getattr(importlib.import_module(f"stages.{stage}"), stage)(**arguments, params=Path("params.yaml"))


@pytest.fixture
def real(tmp_path, monkeypatch):
    """The profile of the real model with all steps, in a folder where nothing else is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(
        read_profiles()["wan2.2-i2v-a14b"].replace("steps_per_bin: 2", "steps_per_bin: null")
    )
    return make_workload(tmp_path / "params.yaml")
