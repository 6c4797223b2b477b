"""What a pretend device counts, and how much memory it has."""

import sys
import weakref
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Traffic:
    """How often work on a device made the host wait for a value, sent the device a tensor, and started a kernel."""

    host_reads: int = 0
    copies: int = 0
    launches: int = 0

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    def shared_by(self, units: int) -> "Traffic":
        """That of one unit of several, rounded up."""
        return Traffic(*(-(-getattr(self, field.name) // units) for field in fields(self)))


class Ledger:
    """Counts events and live bytes of all pretend devices of this process."""

    def __init__(self):
        self.clear()
        self.limit: int | None = None
        self._leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()

    def clear(self) -> None:
        """Count from zero, also the bytes: what still lives from before is forgotten."""
        self.live: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()
        self.peak: Counter[int] = Counter()
        self.places: dict[str, Counter[str]] | None = None

    def note_places(self) -> None:
        """From now on, also count from which line of this repository each host read and each copy came."""
        self.places = {"host_reads": Counter(), "copies": Counter()}

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.counts["host_reads"], self.counts["copies"], self.counts["launches"])

    def count(self, event: str, times: int = 1) -> None:
        self.counts[event] += times
        if self.places is not None and times and event in self.places:
            self.places[event][_calling_line()] += times

    def lease(self, storage: torch.UntypedStorage, index: int) -> "Lease":
        """What keeps a storage's bytes accounted for. Raises OutOfMemoryError if they don't fit beside what lives."""
        lease = self._leases.get(storage._cdata)
        if lease is None:
            self._check_room(storage.nbytes(), index)
            lease = self._leases[storage._cdata] = Lease(storage, index, self.live, self.peak)
        return lease

    def _check_room(self, size: int, index: int) -> None:
        if self.limit is not None and self.live[index] + size > self.limit:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes. GPU {index} (pretend) has a total capacity of "
                f"{self.limit} bytes of which {self.limit - self.live[index]} bytes are free."
            )


def _calling_line() -> str:
    """The innermost line of lib/ or stages/ that is being run, as file:line."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "lib") or path.is_relative_to(ROOT / "stages"):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Lease:
    """The bytes of one storage, while a tensor on the device has it. It holds the storage, whose address is its key."""

    def __init__(self, storage: torch.UntypedStorage, index: int, live: Counter[int], peak: Counter[int]):
        self.storage, self.index, self.size, self.live = storage, index, storage.nbytes(), live
        live[index] += self.size
        peak[index] = max(peak[index], live[index])

    def __del__(self):
        self.live[self.index] -= self.size


LEDGER = Ledger()
