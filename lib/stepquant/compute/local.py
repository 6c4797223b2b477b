"""Workers on this machine: this process itself, or spawned ones."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from stepquant.compute.process import die_with_parent
from stepquant.compute.task import Outcome, Task, describe_worker, run_task
from stepquant.compute.units import UnitStore
from stepquant.errors import UserError
from stepquant.params import Compute

ATTEMPTS = 3


class InProcess:
    """Runs one task after another in this process, which is prepared already. Errors are raised, not returned."""

    def __init__(self, compute: Compute):
        self.compute = compute

    def describe(self) -> dict[str, str] | UserError:
        return describe_worker(self.compute)

    def run(self, tasks: Sequence[Task], root: Path, versions: dict[str, str]) -> Iterator[Outcome]:
        store = UnitStore(root)
        for task in tasks:
            yield Outcome(task.key, store.make(task.key, task.work).digest, "")

    def close(self) -> None:
        pass


class Processes:
    """`compute.workers` spawned processes. If one dies, its whole pool fails, and a new pool makes what is missing."""

    def __init__(self, compute: Compute):
        self.compute = compute
        self.pool = self._new_pool()

    def describe(self) -> dict[str, str] | UserError:
        try:
            return self.pool.submit(describe_worker, self.compute).result()
        except BrokenProcessPool:
            return UserError(lost_workers(1))

    def run(self, tasks: Sequence[Task], root: Path, versions: dict[str, str]) -> Iterator[Outcome]:
        pending = {task.key: task for task in tasks}
        deaths = 0
        while pending:
            futures = [self.pool.submit(run_task, task, root, self.compute, versions) for task in pending.values()]
            try:
                for future in as_completed(futures):
                    outcome = future.result()
                    del pending[outcome.key]
                    deaths = 0
                    yield outcome
            except BrokenProcessPool:
                deaths += 1
                if deaths == ATTEMPTS:
                    raise UserError(lost_workers(deaths)) from None
                self.close()
                self.pool = self._new_pool()

    def close(self) -> None:
        """Wait for the tasks that have begun, whose units are worth keeping, and drop the others."""
        self.pool.shutdown(cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        # Spawned, because a process that has used threads or a GPU cannot be forked safely.
        return ProcessPoolExecutor(
            self.compute.workers, multiprocessing.get_context("spawn"), initializer=_enter_worker
        )


def lost_workers(times: int) -> str:
    """The message after workers died several times in a row."""
    return (
        f"workers died {times} times in a row without finishing a unit, most likely for lack of memory; "
        "lower compute.workers or capture.calls_per_chunk, or read the log of the machine; finished units are kept"
    )


def _enter_worker() -> None:
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)
