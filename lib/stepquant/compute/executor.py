"""Runs independent units of work: in this process, in several, or on a Ray cluster. Nothing else knows which.

The process that does the work of a unit also commits it (compute/units.py) and returns only its digest. So a unit that
was finished before a worker, a machine or this process was lost is never made again, and results need no channel other
than the folder that all processes share.
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
from stepquant.torch_setup import check_device_name, numerics_versions, prepare_arithmetic, prepare_torch


class Engine(Protocol):
    """Workers."""

    def describe(self) -> dict[str, str] | UserError:
        """The `numerics_versions` of a worker, or what is wrong with its device."""

    def run(self, tasks: Sequence[Task], root: Path, versions: dict[str, str]) -> Iterator[Outcome]:
        """Make units.

        Args:
            tasks: The units.
            root: Their folder.
            versions: What every worker must find as its own `numerics_versions`.

        Yields:
            The outcome of each task as soon as it is finished, in any order.

        Raises:
            UserError: Workers die again and again.
        """

    def close(self) -> None:
        """Stop the workers. Closing twice is allowed."""


class Executor:
    """Makes units with the workers that the parameters ask for. A context: its end stops the workers.

    Workers start when they are first needed.
    """

    def __init__(self, compute: Compute, code: Sequence[Path]):
        """
        Args:
            compute: Device, threads, and the choice of workers.
            code: Folders of the packages that a task imports. They are sent to workers on other machines.
        """
        self.compute, self.code = compute, code

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *_: object) -> None:
        if "_engine" in self.__dict__:
            self._engine.close()

    @cached_property
    def versions(self) -> dict[str, str]:
        """The `numerics_versions` where the work runs, for the keys of the units. Prepares this process as well.

        If workers own the GPU, one of them is asked: this process may be on a machine without any, and its CUDA
        context would take 0.6 GB of the card.

        Raises:
            UserError: The device cannot be used there.
        """
        if self.compute.device == "cpu":
            prepare_torch(self.compute)
            return numerics_versions(self.compute.device)
        check_device_name(self.compute.device)
        prepare_arithmetic(self.compute.threads)
        found = self._engine.describe()
        if isinstance(found, UserError):
            raise found
        return found

    def map_units(self, store: UnitStore, tasks: Sequence[Task], progress: Meter) -> list[Unit]:
        """Make the units that are missing.

        Args:
            store: Where the units are kept.
            tasks: One per unit.
            progress: Counts the units.

        Returns:
            The finished unit of every task, in the order of the tasks.

        Raises:
            UserError: The first error that a worker reports. Units that others finish until then are kept.
        """
        units = {task.key: unit for task in tasks if (unit := store.find(task.key))}
        progress.skip(len(units))
        missing = [task for task in tasks if task.key not in units]
        for outcome in self._engine.run(missing, store.root, self.versions) if missing else ():
            sys.stderr.write(outcome.stderr)
            if isinstance(outcome.result, UserError):
                raise outcome.result
            units[outcome.key] = Unit(store.root / outcome.key, outcome.result)
            progress.step()
        return [units[task.key] for task in tasks]

    @cached_property
    def _engine(self) -> Engine:
        if self.compute.executor == "ray":
            from stepquant.compute.ray import RayWorkers

            return RayWorkers(self.compute, self.code)
        from stepquant.compute.local import InProcess, Processes

        return InProcess(self.compute) if self.compute.workers == 1 else Processes(self.compute)
