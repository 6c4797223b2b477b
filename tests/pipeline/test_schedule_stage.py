"""Stages schedule and pack on other budgets and on damaged artifacts, in a copy of the finished workspace."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.stages.conftest import Folder, in_process
from tests.workspace import Workspace

HIGH = Path("artifacts/sensitivity/high_noise")
SCHEDULE = Path("artifacts/schedule.json")


@pytest.fixture
def folder(workspace: Workspace, tmp_path, monkeypatch) -> Folder:
    """The artifacts by hardlinks; `replace` puts other files in their place."""
    for name in ("artifacts", "data", "params.yaml"):
        subprocess.run(["cp", "-al", workspace.root / name, tmp_path / name], check=True)
    replace(tmp_path / "params.yaml", (tmp_path / "params.yaml").read_bytes())
    in_process(monkeypatch, tmp_path)
    return Folder(tmp_path)


def replace(file: Path, content: bytes | None) -> None:
    """Other content under the same name, or none."""
    file.unlink()
    if content is not None:
        file.write_bytes(content)


def message(folder: Folder, stage: str, *arguments: str) -> str:
    """What a stage says that must refuse."""
    result = folder.run(stage, *arguments)
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1, (result.output, result.exception)
    return result.stderr.rpartition("error: ")[2]


@pytest.mark.parametrize("name", ["manifest.json", "products.safetensors", "tokens.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_damaged_sensitivity(folder, name, how):
    file = min(HIGH.rglob(name))
    replace(file, None if how == "missing" else file.read_bytes()[:40])
    assert message(folder, "schedule").startswith(f"{file}: ")


@pytest.mark.parametrize("how", ["missing", "cut", "another"])
def test_a_damaged_schedule(folder, how):
    before = SCHEDULE.read_bytes()
    replace(SCHEDULE, {"missing": None, "cut": before[:-10], "another": b'{"budget": 0.1}'}[how])
    found = message(folder, "pack", "--variant", "scheduled")
    assert found.startswith(f"{SCHEDULE}: ") and "run stage schedule" in found


def test_a_schedule_for_other_bins(folder):
    found = json.loads(SCHEDULE.read_text())
    found["experts"]["low_noise"]["bin_edges"] = [900.0, 600.0, 0.0]
    replace(SCHEDULE, json.dumps(found).encode())
    assert message(folder, "pack", "--variant", "scheduled").startswith(
        f"{SCHEDULE}: made for the bins [900.0, 600.0, 0.0] of low_noise, but the clips have [900.0, 700.0, 0.0]"
    )


def test_other_budgets_take_more_slots_or_none(folder):
    found = {}
    for budget in (0.6, 0.0, 0.3):
        folder.set("precision.activation_budget", budget)
        folder.finish("schedule")
        found[budget] = json.loads(SCHEDULE.read_text())
        assert found[budget]["share"] <= budget
    slots = {budget: sum(len(expert["eight_bit"]) for expert in s["experts"].values()) for budget, s in found.items()}
    assert slots[0.0] == 0 < slots[0.3] and found[0.3]["share"] < found[0.6]["share"]
