"""One unit of work on its way to a worker and back. Any engine can run one, in any process that shares the folder."""

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stepquant.command_runner import user_error
from stepquant.compute.units import UnitStore
from stepquant.errors import UserError
from stepquant.params import Compute
from stepquant.torch_setup import numerics_versions, prepare_torch


@dataclass(frozen=True)
class Task:
    """A unit to make.

    Attributes:
        key: The key of the unit.
        work: Fills the folder of the unit. It is pickled for other processes, so it is a function of a module, a
            partial of one, or a callable dataclass. Paths in it are relative to the current folder, which is the same
            in every worker.
    """

    key: str
    work: Callable[[Path], None]


@dataclass(frozen=True)
class Outcome:
    """What a worker returns.

    Attributes:
        key: The key of the unit.
        result: The digest of the finished unit, or what the user has to fix. The error is a value here, because every
            engine wraps raised exceptions differently.
        stderr: What the work printed to stderr.
    """

    key: str
    result: str | UserError
    stderr: str


def run_task(task: Task, root: Path, compute: Compute, versions: dict[str, str]) -> Outcome:
    """Make one unit in a worker process.

    Args:
        task: The unit and its work.
        root: The folder of the stage's units.
        compute: Device, dtype and threads.
        versions: `numerics_versions` as they are in the key of the unit.

    Returns:
        The outcome. An error that the user can fix is part of it; any other is ours, and is raised.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            prepare_torch(compute)
            _check_versions(versions, numerics_versions(compute.device))
            unit = UnitStore(root).make(task.key, task.work)
    except Exception as error:
        found = user_error(error)
        if found is None:
            raise
        return Outcome(task.key, found, stderr.getvalue())
    return Outcome(task.key, unit.digest, stderr.getvalue())


def describe_worker(compute: Compute) -> dict[str, str] | UserError:
    """The `numerics_versions` of a worker process, or what is wrong with its device."""
    try:
        prepare_torch(compute)
        return numerics_versions(compute.device)
    except UserError as error:
        return error


def _check_versions(expected: dict[str, str], found: dict[str, str]) -> None:
    """Refuse a worker that would make other bytes than the key of the unit stands for."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{name}: {found.get(name)} in a worker on {os.uname().nodename}, and {expected.get(name)} in the keys "
                "of this stage's units; use workers with the same packages and the same model of GPU"
            )
