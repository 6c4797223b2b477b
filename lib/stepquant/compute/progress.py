"""Progress of long work: a bar with rate and time left in a terminal, a plain line per item in a log."""

import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def track(items: Collection[Item], label: str) -> Iterator[Item]:
    """Yield the items and report on stderr how many are done, how long one takes and how long the rest will."""
    return _bar(items, label) if sys.stderr.isatty() else _lines(items, label)


def _bar(items: Collection[Item], label: str) -> Iterator[Item]:
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, description=label)


def _lines(items: Collection[Item], label: str) -> Iterator[Item]:
    start = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        each = (time.monotonic() - start) / done
        print(f"{label}: {done}/{len(items)}, {each:.2f} s each, {each * (len(items) - done):.0f} s left", file=sys.stderr, flush=True)
