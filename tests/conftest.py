import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.workspace import Workspace, make_workspace, ray_folder

# Ray is an extra, and `make test` puts it into a folder of its own.
sys.path.append(str(Path(sys.prefix) / "ray"))
# Two threads on tensors this small are slower than one, and many times slower when the machine is busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    """The pipeline on a tiny model, run once from model to report. Tests that change it take a copy."""
    workspace = make_workspace(tmp_path_factory.mktemp("pipeline") / "workspace")
    workspace.run("dvc", "repro")
    return workspace


@pytest.fixture
def workspace_copy(workspace, tmp_path) -> Workspace:
    """A copy of the finished workspace that a test may change."""
    return workspace.copy(tmp_path / "workspace")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a local Ray cluster of two workers, which this process and its children may join; one per session."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *ray_folder()]))
    environment = {"PYTHONPATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    script = Path(__file__).parent / "compute" / "cluster.py"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
            yield cluster.stdout.readline().strip()
            cluster.stdin.close()
