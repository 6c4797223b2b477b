"""A unit of work on its way to a worker and back: any engine can run one, in any process that shares the folder."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from stepquant.command_runner import remedy
from stepquant.compute.units import UnitStore
from stepquant.errors import UserError
from stepquant.params import Compute
from stepquant.torch_setup import prepare_torch


@dataclass(frozen=True)
class Task:
    """A unit to be made: its key, and the work that fills its folder.

    work travels to other processes by pickle: a function of a module, a partial of one, or a dataclass to be called. Paths
    in it are relative to the current folder, which every worker has as its own.
    """

    key: str
    work: Callable[[Path], None]


@dataclass(frozen=True)
class Outcome:
    """What a worker hands back: the unit's digest, or the mistake that the user has to fix; and what it said on stderr."""

    key: str
    digest: str | None
    mistake: str | None
    said: str


def run_task(task: Task, root: Path, compute: Compute) -> Outcome:
    """Make one unit in a worker process. What the user has to fix comes back as text, since each engine dresses up errors
    in its own way; any other error is ours, and is raised."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            prepare_torch(compute)
            unit = UnitStore(root).make(task.key, task.work)
    except (UserError, OSError, SafetensorError) as error:
        mistake = remedy(error)
        if mistake is None:
            raise
        return Outcome(task.key, None, mistake, said.getvalue())
    return Outcome(task.key, unit.digest, None, said.getvalue())
