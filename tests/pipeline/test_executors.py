"""Where the work runs changes no byte: stages with spawned workers, one of which is killed, and on a Ray cluster."""

import subprocess
import time

import psutil
import pytest

from tests.pipeline.test_dvc_yaml import tree
from tests.workspace import LONGEST, Workspace


@pytest.fixture
def fresh(workspace_copy) -> Workspace:
    """A finished workspace without units."""
    subprocess.run(["rm", "-r", workspace_copy.root / ".units"], check=True)
    return workspace_copy


def test_two_spawned_workers_one_of_them_killed(fresh):
    fresh.set("compute.workers", 2)
    out = fresh.root / "artifacts/residual/low_noise"
    expected = tree(out)
    process = fresh.start("stages.gptq", "--expert", "low_noise")
    worker_of(process).kill()
    output = process.communicate(timeout=LONGEST)[0]
    assert process.returncode == 0, output
    assert tree(out) == expected
    assert counts(output, "gptq@low_noise") == ["1/2", "2/2"]


def worker_of(process: subprocess.Popen) -> psutil.Process:
    """One of the workers that a stage has spawned, once it works."""
    while process.poll() is None:
        for child in psutil.Process(process.pid).children():
            if "spawn_main" in " ".join(child.cmdline()) and child.cpu_times().user > 0.5:
                return child
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def test_a_ray_cluster(fresh, ray_cluster):
    """12 calls in shards of 8, two blocks: four units of work."""
    fresh.set("compute.executor", "ray")
    fresh.set("compute.address", ray_cluster)
    out = fresh.root / "artifacts/activations/high_noise.zarr"
    expected = tree(out)
    output = fresh.run("stages.capture", "--expert", "high_noise")
    assert tree(out) == expected
    assert counts(output, "capture@high_noise") == ["1/4", "2/4", "3/4", "4/4"]


def test_a_shard_may_run_through_several_blocks(fresh):
    """12 calls in shards of 8, both blocks in one go: two units of work, which hand on nothing by way of the disk."""
    fresh.set("capture.blocks_per_shard", 2)
    out = fresh.root / "artifacts/activations/high_noise.zarr"
    expected = tree(out)
    output = fresh.run("stages.capture", "--expert", "high_noise")
    assert tree(out) == expected
    assert counts(output, "capture@high_noise") == ["1/2", "2/2"]


def counts(output: str, label: str) -> list[str]:
    """What the lines of progress have counted."""
    return [
        line.removeprefix(f"{label}: ").split(",")[0] for line in output.splitlines() if line.startswith(f"{label}: ")
    ]
