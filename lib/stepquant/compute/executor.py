"""Runs independent units of work: in this process, in several, or on a Ray cluster. Nothing else knows which.

Whoever does the work of a unit also commits it (compute/units.py) and hands back no more than its digest. So a unit that
was finished before a worker, a machine or this process was lost is never made again, and a result needs no way back
but the folder that all of them share.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from stepquant.compute.progress import Meter
from stepquant.compute.task import Outcome, Task
from stepquant.compute.units import Unit, UnitStore
from stepquant.errors import UserError
from stepquant.params import Compute


class Engine(Protocol):
    """Workers. run: the outcome of each task as soon as it is there, in any order. Raises UserError if workers keep dying."""

    def run(self, tasks: Sequence[Task], root: Path) -> Iterator[Outcome]: ...

    def close(self) -> None: ...


class Executor:
    """Makes units with the workers that the params ask for; they start with the first missing unit and end with the block.

    code: the folders of the packages that a task needs; they travel to workers on other machines.
    """

    def __init__(self, compute: Compute, code: Sequence[Path]):
        self.compute, self.code = compute, code

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *_: object) -> None:
        if "_engine" in self.__dict__:
            self._engine.close()

    def map_units(self, store: UnitStore, tasks: Sequence[Task], progress: Meter) -> list[Unit]:
        """The finished unit of every task, in the order of the tasks; only those that are missing are made.

        Raises UserError for the first mistake that a worker reports; what other workers finish until then stays.
        """
        units = {task.key: unit for task in tasks if (unit := store.find(task.key))}
        progress.skip(len(units))
        missing = [task for task in tasks if task.key not in units]
        for outcome in self._engine.run(missing, store.root) if missing else ():
            sys.stderr.write(outcome.said)
            if outcome.mistake is not None:
                raise UserError(outcome.mistake)
            units[outcome.key] = Unit(store.root / outcome.key, outcome.digest)
            progress.step()
        return [units[task.key] for task in tasks]

    @cached_property
    def _engine(self) -> Engine:
        if self.compute.executor == "ray":
            from stepquant.compute.ray import RayWorkers

            return RayWorkers(self.compute, self.code)
        from stepquant.compute.local import InProcess, Processes

        return InProcess() if self.compute.workers == 1 else Processes(self.compute)
