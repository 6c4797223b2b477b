"""What a pretend device counts, and how much memory it has."""

import weakref
from collections import Counter
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Traffic:
    """How often work on a device made the host wait for a value, sent the device a tensor, and started a kernel there."""

    host_reads: int = 0
    copies: int = 0
    launches: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))


class Ledger:
    """Counts events and live bytes of all pretend devices of this process."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.live: Counter[int] = Counter()
        self.peak: Counter[int] = Counter()
        self.limit: int | None = None
        self._leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.counts["host_reads"], self.counts["copies"], self.counts["launches"])

    def count(self, event: str, times: int = 1) -> None:
        self.counts[event] += times

    def lease(self, storage: torch.UntypedStorage, index: int) -> "Lease":
        """What keeps a storage's bytes accounted for. Raises OutOfMemoryError if they don't fit beside what lives."""
        lease = self._leases.get(storage._cdata)
        if lease is None:
            self._check_room(storage.nbytes(), index)
            lease = self._leases[storage._cdata] = Lease(self, storage, index)
        return lease

    def _check_room(self, size: int, index: int) -> None:
        if self.limit is not None and self.live[index] + size > self.limit:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes. GPU {index} (pretend) has a total capacity of {self.limit} bytes "
                f"of which {self.limit - self.live[index]} bytes are free."
            )


class Lease:
    """The bytes of one storage, for as long as some tensor on the device has it. It holds the storage, whose address is its key."""

    def __init__(self, ledger: Ledger, storage: torch.UntypedStorage, index: int):
        self.ledger, self.storage, self.index, self.size = ledger, storage, index, storage.nbytes()
        ledger.live[index] += self.size
        ledger.peak[index] = max(ledger.peak[index], ledger.live[index])

    def __del__(self):
        self.ledger.live[self.index] -= self.size


LEDGER = Ledger()
