import pytest
import torch

from tests.workspace import Workspace, make_workspace

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
