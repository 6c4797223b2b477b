"""`stepquant plan`: from a params file or a profile to printed tables."""

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from stepquant import params as knobs
from stepquant import profiles
from stepquant.errors import UserError
from stepquant.plan.rates import GPUS, USUAL, Machine, cpu
from stepquant.plan.run import Run, find_model
from stepquant.plan.table import assumptions, calibration_warnings, model_lines, plan_table, prompt_line, warnings

RECORDED = Path("artifacts/model/manifest.json")


def print_plan(params: Path, profile: str | None, names: list[str]) -> None:
    """Print what a run under params, or under a profile, would take on some machines. Raises UserError for an unknown name."""
    if profile is None:
        return _print(params, names)
    ready = profiles.read_profiles()
    if profile not in ready:
        raise UserError(f"no profile '{profile}'; allowed: {', '.join(sorted(ready))}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{profile}.yaml"
        file.write_text(profiles.overlay(params.read_text() if params.exists() else None, ready[profile]))
        _print(file, names)


def make_run(params: Path) -> Run:
    """The run that a params file describes."""
    knobs.check(params)

    @cache  # reading the file takes longer than all that follows
    def knob(section: str, expert: str | None = None) -> Any:
        return knobs.section(params, section, expert)

    model = knob("model")
    return Run(*find_model(model.source, model.revision, RECORDED), knob)


def machines(names: list[str], compute: Any) -> list[Machine]:
    """The machines of some names; without any, this one if it has the device of the params, else the usual ones."""
    if not names:
        names = ["cpu"] if compute.device == "cpu" else list(USUAL)
    allowed = ["cpu", *GPUS]
    if unknown := [name for name in names if name not in allowed]:
        raise UserError(f"--machine {unknown[0]}; allowed: {', '.join(allowed)}")
    here = cpu(compute.threads, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), shutil.disk_usage(".").free)
    return [here if name == "cpu" else GPUS[name] for name in names]


def _print(params: Path, names: list[str]) -> None:
    run, console = make_run(params), Console(highlight=False, soft_wrap=True, width=100)
    for line in (*model_lines(run), prompt_line(run)):
        console.print(line)
    for line in calibration_warnings(run):
        console.print(f"warning: {line}")
    for machine in machines(names, run.knob("compute")):
        console.print()
        console.print(plan_table(run, machine))
        for line in warnings(run, machine):
            console.print(f"warning: {line}")
        console.print(assumptions(machine))
