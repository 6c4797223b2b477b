from pathlib import Path

import pytest
import torch

from tests.once import once
from tests.workspace import Workspace, make_workspace

# Two threads on tensors this small are slower than one, and many times slower when the machine is busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    """The pipeline on a tiny model, run once from model to report. Tests that change it take a copy."""

    def make(folder: Path) -> None:
        make_workspace(folder).run("dvc", "repro")

    return Workspace(once(tmp_path_factory, "workspace", make))


@pytest.fixture
def workspace_copy(workspace, tmp_path) -> Workspace:
    """A copy of the finished workspace that a test may change."""
    return workspace.copy(tmp_path / "workspace")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the whole pipeline come first: while one process makes their workspace, another does the rest."""
    items.sort(key=lambda item: "workspace" not in item.fixturenames)
