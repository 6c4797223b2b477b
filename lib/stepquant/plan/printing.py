"""`stepquant plan`: from a params file or a profile to printed tables."""

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from stepquant import params as parameters
from stepquant import profiles
from stepquant.errors import UserError
from stepquant.models.checks import check_known
from stepquant.plan.find_model import find_model
from stepquant.plan.rates import GPUS, USUAL, Machine, cpu
from stepquant.plan.table import (
    assumptions,
    calibration_warnings,
    disk_line,
    model_lines,
    only_lines,
    plan_table,
    precision_line,
    prompt_line,
    prompt_warnings,
    warnings,
)
from stepquant.plan.workload import Workload
from stepquant.preflight import is_here, look_at_model, look_at_prompts

RECORDED = Path("artifacts/model/manifest.json")


def print_plan(params: Path, profile: str | None, names: list[str]) -> None:
    """Print what a run would take.

    Args:
        params: The params file.
        profile: A profile that replaces the file, or is applied on top of it if it has only some sections.
        names: Machines (`rates.GPUS`, or cpu); without any, this one or the usual GPUs.

    Raises:
        UserError: A name is not known, or the parameters or the model cannot be read.
    """
    if profile is None:
        return _print(params, names)
    chosen = profiles.choose(profiles.read_profiles(), profile)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{profile}.yaml"
        current = params.read_text(encoding="utf-8-sig") if params.exists() else None
        file.write_text(profiles.overlay(current, chosen))
        _print(file, names)


def make_workload(params: Path) -> Workload:
    """The work that a params file describes. Raises UserError if the file is wrong or the model is not known."""
    parameters.check(params)

    @cache  # reading the file takes longer than everything else
    def parameter(section: str, expert: str | None = None) -> Any:
        return parameters.section(params, section, expert)

    model = parameter("model")
    return Workload(find_model(model.source, model.revision, RECORDED), parameter)


def machines(names: list[str], compute: Any) -> list[Machine]:
    """The machines with these names; without any, this one if `compute.device` is cpu, else the usual GPUs."""
    if not names:
        names = ["cpu"] if compute.device == "cpu" else list(USUAL)
    allowed = ["cpu", *GPUS]
    if unknown := [name for name in names if name not in allowed]:
        raise UserError(f"--machine {unknown[0]}; allowed: {', '.join(allowed)}")
    here = cpu(compute.threads, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), shutil.disk_usage(".").free)
    return [here if name == "cpu" else GPUS[name] for name in names]


def _print(params: Path, names: list[str]) -> None:
    if is_here(params):
        look_at_model(params)
    run, console = make_workload(params), Console(highlight=False, soft_wrap=True, width=100)
    if run.model.download:  # the model is not here to be looked at
        check_known(run.manifest, run.model.scheduler, run.parameter("sampling"), run.parameter("bins").by_expert)
    for line in (*model_lines(run), precision_line(run), prompt_line(run)):
        console.print(line)
    for line in (*prompt_warnings(run), *calibration_warnings(run)):
        console.print(f"warning: {line}")
    try:  # a plan is of use before there are prompts
        look_at_prompts(params)
    except UserError as error:
        console.print(f"warning: {error}")
    for machine in machines(names, run.parameter("compute")):
        console.print()
        console.print(plan_table(run, machine))
        console.print(disk_line(run, machine))
        for line in warnings(run, machine):
            console.print(f"warning: {line}")
        console.print(assumptions(run, machine))
    console.print()
    for line in only_lines():
        console.print(line)
