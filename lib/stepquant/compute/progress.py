"""Progress of long work: a bar with rate and time left in a terminal, a plain line per item in a log."""

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
    """Counts the items of some work on stderr."""

    def step(self) -> None:
        """One more is done."""

    def skip(self, count: int) -> None:
        """Some need not be done: an earlier run finished them."""

    def extend(self, count: int) -> None:
        """Some have to be done that were not expected."""


def track(items: Collection[Item], label: str) -> Iterator[Item]:
    """Yield the items and report on stderr how many are done, how long one takes and how long the rest will."""
    with meter(label, len(items)) as progress:
        for item in items:
            yield item
            progress.step()


@contextmanager
def meter(label: str, total: int) -> Iterator[Meter]:
    """A meter for `total` items, for the length of the block."""
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
    """What was finished earlier leaves the bar's total, so that the time left is that of the rest."""

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
