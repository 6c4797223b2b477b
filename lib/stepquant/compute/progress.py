"""Progress on stderr: a bar with the time left in a terminal, a line per item in a log."""

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")


class Meter(Protocol):
    """Counts the items of some work."""

    def step(self) -> None:
        """Count one more item as done."""

    def skip(self, count: int) -> None:
        """Count items as done that an earlier run finished. They do not enter the estimate of the time left."""

    def extend(self, count: int) -> None:
        """Add items to the total."""


def track(items: Collection[Item], label: str) -> Iterator[Item]:
    """Yield the items, and count each as done when the next one is asked for."""
    with meter(label, len(items)) as progress:
        for item in items:
            yield item
            progress.step()


@contextmanager
def meter(label: str, total: int) -> Iterator[Meter]:
    """A meter for `total` items, shown under a label while the block runs."""
    if sys.stderr.isatty():
        with _terminal() as progress:
            yield _Bar(progress, progress.add_task(label, total=total), total)
    else:
        yield _Lines(label, total)


def _terminal() -> Progress:
    from rich.console import Console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


class _Bar:
    """Skipped items are taken from the total of the bar, so that its estimate covers only the others."""

    def __init__(self, progress: Progress, task: TaskID, total: int):
        self.progress, self.task, self.total = progress, task, total

    def step(self) -> None:
        self.progress.advance(self.task)

    def skip(self, count: int) -> None:
        self.extend(-count)

    def extend(self, count: int) -> None:
        self.total += count
        self.progress.update(self.task, total=self.total)


class _Lines:
    def __init__(self, label: str, total: int):
        self.label, self.total = label, total
        self.done, self.skipped, self.start = 0, 0, time.monotonic()

    def step(self) -> None:
        self.done += 1
        each = (time.monotonic() - self.start) / (self.done - self.skipped)
        self._print(f"{each:.2f} s each, {each * (self.total - self.done):.0f} s left")

    def skip(self, count: int) -> None:
        if count:
            self.done, self.skipped = self.done + count, self.skipped + count
            self._print("finished earlier")

    def extend(self, count: int) -> None:
        self.total += count

    def _print(self, text: str) -> None:
        print(f"{self.label}: {self.done}/{self.total}, {text}", file=sys.stderr, flush=True)
