"""What is predicted is what is written, artifact by artifact, on two models that only have the code in common."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stepquant.plan.printing import make_workload
from stepquant.plan.sizes import (
    artifact_sizes,
    hidden_states,
    packed_expert,
    safetensors_bytes,
    shard_sums,
    trajectories,
)
from stepquant.profiles import read_profiles

WITHIN = 0.1
CLOSER = {"sensitivity": 0.02, "schedule.json": 0.05}  # products are exact; the rest is text
NAMES = (
    "trajectories.zarr",
    "activations",
    "lowrank",
    "residual",
    "clip",
    "sensitivity",
    "schedule.json",
    "checkpoints/full",
)


def compare(root: Path, name: str, monkeypatch, sampled: bool = True) -> None:
    """Predicted against found bytes and files of the artifacts of one kind below a folder."""
    monkeypatch.chdir(root)
    run = make_workload(Path("params.yaml"))
    sizes = artifact_sizes(run) | {"trajectories.zarr": trajectories(run, sampled)}
    sizes = {path: size for path, size in sizes.items() if path.startswith(name)}
    assert sizes
    for path, size in sizes.items():
        found = root / "artifacts" / path
        files = [file for file in (found, *found.rglob("*")) if file.is_file()]
        assert size.bytes == pytest.approx(sum(file.stat().st_size for file in files), rel=CLOSER.get(name, WITHIN))
        if not path.startswith("checkpoints"):  # the other components' files are not counted
            assert size.files == len(files)


@pytest.mark.parametrize("name", NAMES)
def test_artifacts_of_a_made_shape(made, name, monkeypatch):
    compare(made, name, monkeypatch, sampled=False)


@pytest.mark.parametrize("name", NAMES)
def test_artifacts_of_the_tiny_pipeline(workspace, name, monkeypatch):
    compare(workspace.root, name, monkeypatch)


def test_a_safetensors_file_to_the_byte(tmp_path):
    tensors = {
        "site.proj_up": torch.zeros(48, 16).bfloat16(),
        "site.scales": torch.zeros(48, 2),
        "site.rotation": torch.tensor(64),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    assert (
        safetensors_bytes({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        == (tmp_path / "file.safetensors").stat().st_size
    )


def test_the_real_model(tmp_path, monkeypatch):
    """14.05 G weights of 4.25 bits (int4 with a bfloat16 scale for 64), a branch of rank 32 and 0.48 GB in BF16 are
    8.3 GB per expert. Hidden states are 2 bytes for 5,120 channels of 32,760 tokens of 168 calls (14 prompts, two
    branches, two steps in each of three bins), twice."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(read_profiles()["wan2.2-i2v-a14b"])
    run = make_workload(Path("params.yaml"))
    high, _ = run.experts
    branch = 40 * 32 * 2 * sum(site.K * len(site.linears) + site.N for site in high.sites)
    assert packed_expert(run, high).bytes == pytest.approx(
        14_050_918_400 * 4.25 / 8 + branch + high.rest_bytes(2), rel=0.002
    )
    assert hidden_states(run, high).bytes == 2 * 168 * 32760 * 5120 * 2
    assert shard_sums(run, high).bytes == 2 * 10 * 2 * 4 * (
        6 * 5120**2 + 13824**2
    )  # ten blocks, 96 calibration calls in shards of 48
    sizes = artifact_sizes(run)
    assert max(size.files for size in sizes.values()) < 2000
    assert sum(sizes[f"activations/{expert.name}.zarr"].bytes for expert in run.experts) == pytest.approx(
        2 * 70.95e9, rel=0.01
    )
