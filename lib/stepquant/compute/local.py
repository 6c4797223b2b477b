"""Workers on this machine: this process itself, or spawned ones."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from stepquant.compute.process import die_with_parent
from stepquant.compute.task import Outcome, Task, run_task
from stepquant.compute.units import UnitStore
from stepquant.errors import UserError
from stepquant.params import Compute

ATTEMPTS = 3


class InProcess:
    """One task after the other in this process, whose threads are set already; errors and output take their usual way."""

    def run(self, tasks: Sequence[Task], root: Path) -> Iterator[Outcome]:
        store = UnitStore(root)
        for task in tasks:
            yield Outcome(task.key, store.make(task.key, task.work).digest, None, "")

    def close(self) -> None:
        pass


class Processes:
    """`compute.workers` spawned processes. One that dies takes the pool with it: a new pool goes on with what is missing."""

    def __init__(self, compute: Compute):
        self.compute = compute
        self.pool = self._new_pool()

    def run(self, tasks: Sequence[Task], root: Path) -> Iterator[Outcome]:
        pending = {task.key: task for task in tasks}
        deaths = 0
        while pending:
            futures = [self.pool.submit(run_task, task, root, self.compute) for task in pending.values()]
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
        """Wait for the tasks that have begun (their units are worth keeping), and drop the others."""
        self.pool.shutdown(cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        # Not forked: a process that has used threads or a GPU cannot be.
        return ProcessPoolExecutor(
            self.compute.workers, multiprocessing.get_context("spawn"), initializer=_enter_worker
        )


def lost_workers(times: int) -> str:
    return (
        f"workers died {times} times in a row without finishing a unit, most likely for want of memory; "
        "lower compute.workers or capture.calls_per_chunk, or look into the machine's log; finished units are kept"
    )


def _enter_worker() -> None:
    die_with_parent()
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)
