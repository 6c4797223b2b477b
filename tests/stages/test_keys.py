"""What the key of a unit covers: another library version, GPU or code makes another unit."""

from pathlib import Path

import pytest

from stages import _stage
from stages._stage import Place, open_stage
from stepquant import torch_setup

STAGES = Path(_stage.__file__).parent
LOWRANK = ("lowrank", ("compute", "lowrank"), Place.WORKERS)
TRAJECTORIES = ("trajectories", ("compute", "sampling"), Place.STAGE)


def key(name, reads, device):
    with open_stage(str(STAGES / f"{name}.py"), reads, Path("params.yaml"), device=device) as stage:
        return stage.key(block=0)


def report_version(monkeypatch, package):
    """Let a package say that it has another version, as after `pip install -U`."""
    known = torch_setup.version
    monkeypatch.setattr(torch_setup, "version", lambda name: "99.0" if name == package else known(name))


@pytest.mark.parametrize("stage", [LOWRANK, TRAJECTORIES], ids=["lowrank", "trajectories"])
@pytest.mark.parametrize("package", ["torch", "numpy", "diffusers"])
def test_every_unit_depends_on_what_computes_it(folder, monkeypatch, stage, package):
    before = key(*stage)
    assert key(*stage) == before
    report_version(monkeypatch, package)
    assert key(*stage) != before


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "ftfy", "pillow", "av"])
def test_only_units_that_sample_depend_on_prompts_and_pictures(folder, monkeypatch, package):
    sampled, factored = key(*TRAJECTORIES), key(*LOWRANK)
    report_version(monkeypatch, package)
    assert key(*TRAJECTORIES) != sampled and key(*LOWRANK) == factored


def test_other_packages_make_no_other_units(folder, monkeypatch):
    before = key(*TRAJECTORIES), key(*LOWRANK)
    report_version(monkeypatch, "safetensors")
    assert (key(*TRAJECTORIES), key(*LOWRANK)) == before


def test_another_gpu_makes_other_units(folder, monkeypatch):
    before = key(*LOWRANK)
    monkeypatch.setattr("stepquant.compute.executor.numerics_versions", lambda device: {"gpu": "NVIDIA A100"})
    assert key(*LOWRANK) != before


def test_where_the_work_runs_is_not_in_the_key(folder):
    before = key(*LOWRANK)
    folder.set("compute.workers", 2)
    assert key(*LOWRANK) == before


def test_a_stage_that_does_not_compute_needs_no_device(folder):
    folder.set("compute.device", "cuda:99")
    with open_stage(str(STAGES / "report.py"), ("compute",), Path("params.yaml"), device=Place.NOWHERE) as stage:
        assert stage.versions == {}
