"""Runs stages one after the other in this process, on any device: `python -m tests.device.runner CALLS`.

CALLS is JSON, {name: {"folder": where, "device": "pretend:0", "command": ["stages.clip", "--expert", "low_noise"],
"limit": null}}. A folder is laid out by `lay_out`; its params.yaml gets the device. Each gets a result.json (`Result`).
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
import yaml

from tests.device.libraries import libraries_that_know_the_device
from tests.device.rules import NAME
from tests.device.traffic import Traffic
from tests.pretend_device import pretend_device
from tests.workspace import ROOT, Workspace

RESULT = "result.json"
EXPERT_STAGES = ("capture", "lowrank", "gptq", "clip", "sensitivity")
# Where a stage leaves what it made for an expert or a variant.
OUTS = {
    "trajectories": "artifacts/trajectories.zarr",
    "capture": "artifacts/activations/{}.zarr",
    "lowrank": "artifacts/lowrank/{}",
    "gptq": "artifacts/residual/{}",
    "clip": "artifacts/clip/{}",
    "sensitivity": "artifacts/sensitivity/{}",
    "pack": "artifacts/checkpoints/{}",
    "generate": "artifacts/videos/{}",
    "evaluate": "artifacts/metrics/{}.json",
}


@dataclass(frozen=True)
class Result:
    """How a stage went on a device.

    error: None if it ended well. units: of work, as it counted them on stderr. peak: the most bytes that lived on a
    device at a time, by its index. places: from which lines host reads and copies came.
    """

    error: str | None
    units: int
    traffic: Traffic
    peak: dict[str, int]
    places: dict[str, dict[str, int]]

    @property
    def per_unit(self) -> Traffic:
        """Traffic of one unit, rounded up."""
        return self.traffic.shared_by(self.units)

    @classmethod
    def read(cls, folder: Path) -> "Result":
        values = json.loads((folder / RESULT).read_text())
        return cls(**values | {"traffic": Traffic(**values["traffic"])})


@dataclass(frozen=True)
class Call:
    """One stage for one expert or variant ("" where it has none)."""

    stage: str
    instance: str

    @property
    def out(self) -> str:
        return OUTS[self.stage].format(self.instance)

    @property
    def command(self) -> list[str]:
        option = "--expert" if self.stage in EXPERT_STAGES else "--variant"
        return [f"stages.{self.stage}", *([option, self.instance] if self.instance else [])]

    def __str__(self) -> str:
        return "@".join(filter(None, (self.stage, self.instance)))


def run_stages(
    workspace: Workspace, calls: list[Call], device: str, root: Path, limit: int | None = None
) -> dict[Call, Result]:
    """Run stages of a finished workspace again, on a device, in one new process, each in a folder below `root`."""
    folders = {call: root / str(call) for call in calls}
    for call, folder in folders.items():
        lay_out(workspace, folder, call.out)
    common = {"device": device, "limit": limit}
    listed = {
        str(call): common | {"folder": os.fspath(folder), "command": call.command} for call, folder in folders.items()
    }
    (root / "calls.json").write_text(json.dumps(listed))
    path = os.pathsep.join([os.fspath(ROOT / "lib"), os.fspath(ROOT)])
    script = [sys.executable, "-m", "tests.device.runner", os.fspath(root / "calls.json")]
    subprocess.run(script, env=workspace.environment | {"PYTHONPATH": path}, check=True)
    return {call: Result.read(folder) for call, folder in folders.items()}


def lay_out(workspace: Workspace, folder: Path, out: str) -> None:
    """The workspace again without units and without one out, by hardlinks, since no stage changes what it reads."""
    folder.mkdir(parents=True)
    subprocess.run(["cp", "-al", workspace.root / "artifacts", workspace.root / "data", folder], check=True)
    subprocess.run(["rm", "-r", folder / out], check=True)
    (folder / "params.yaml").write_text((workspace.root / "params.yaml").read_text())


def set_device(folder: Path, device: str) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["compute"] |= {"device": device, "offload": "none" if device == "cpu" else "model"}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def run(folder: Path, device: str, command: list[str], limit: int | None = None) -> Result:
    """Run one stage, under the pretend device if that is asked for; limit: bytes that the device has."""
    set_device(folder, device)
    os.chdir(folder)
    said = io.StringIO()
    if not device.startswith(NAME):
        with libraries_that_know_the_device():
            return Result(outcome(command, said), units_in(said.getvalue()), Traffic(), {}, {})
    with pretend_device(limit) as ledger:
        ledger.note_places()
        error = outcome(command, said)
        peak = {str(index): size for index, size in ledger.peak.items() if size}
        places = {event: dict(found.most_common()) for event, found in ledger.places.items()}
        return Result(error, units_in(said.getvalue()), ledger.traffic, peak, places)


def outcome(command: list[str], said: io.StringIO) -> str | None:
    """What went wrong in a stage; `said` gets what it prints on stderr."""
    stage, options = stage_of(command)
    try:
        with contextlib.redirect_stderr(said):
            stage(**options)
    except typer.Exit:
        return said.getvalue()
    except Exception:
        return traceback.format_exc()
    return None


def stage_of(command: list[str]) -> tuple[Callable[..., None], dict[str, str]]:
    """The function behind `python -m stages.NAME ...`, and its options."""
    module, *arguments = command
    options = {flag.removeprefix("--"): value for flag, value in zip(arguments[::2], arguments[1::2])}
    return getattr(importlib.import_module(module), module.removeprefix("stages.")), options


def units_in(said: str) -> int:
    """How many units of work the lines of progress count, such as `gptq@low_noise: 2/2, ...`; 1 if there is no line."""
    totals = dict(re.findall(r"^(.+): \d+/(\d+)", said, re.MULTILINE))
    return sum(map(int, totals.values())) or 1


if __name__ == "__main__":
    for call in json.loads(Path(sys.argv[1]).read_text()).values():
        folder = Path(call["folder"])
        (folder / RESULT).write_text(json.dumps(asdict(run(folder, call["device"], call["command"], call["limit"]))))
