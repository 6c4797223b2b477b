import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# `make test` puts Ray and PEFT into folders of their own (Makefile). Processes that tests start do not find them here.
# First of all, since diffusers looks for PEFT when it is imported.
sys.path += [str(Path(sys.prefix) / name) for name in ("ray", "peft")]

from tests.device_fixture import device  # noqa: F401 (a fixture)
from tests.once import once
from tests.warm_python import warm_python
from tests.workspace import Workspace, make_workspace, ray_folder

# Two threads on tensors this small are slower than one, and many times slower when the machine is busy.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    """The pipeline on a tiny model, run once from model to report. Tests that change it take a copy."""

    def make(folder: Path) -> None:
        with warm_python() as environment:
            make_workspace(folder).run("dvc", "repro", **environment)

    return Workspace(once(tmp_path_factory, "workspace", make))


@pytest.fixture
def workspace_copy(workspace, tmp_path) -> Workspace:
    """A copy of the finished workspace that a test may change."""
    return workspace.copy(tmp_path / "workspace")


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """Every test starts with gradients on, although stages that ran in this process have turned them off."""
    torch.set_grad_enabled(True)
    yield
    torch.set_grad_enabled(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the whole pipeline come first: while one process makes their workspace, another does the rest."""
    items.sort(key=lambda item: "workspace" not in item.fixturenames)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory) -> Iterator[str]:
    """The address of a local Ray cluster of two workers for this process and its children; one per test run."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "token").write_text(secrets.token_hex(32))
        run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        command = [sys.executable, Path(__file__).parent / "compute" / "cluster.py", str(run), folder / "address"]
        cluster = subprocess.Popen(command, env=os.environ | environment(folder), start_new_session=True)
        while not (folder / "address").exists():
            assert cluster.poll() is None, "Ray does not start; `make test` installs it"
            time.sleep(0.05)

    def environment(folder: Path) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *ray_folder()]))
        return {"PYTHONPATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": (folder / "token").read_text()}

    folder = once(tmp_path_factory, "ray", make)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        yield (folder / "address").read_text()
