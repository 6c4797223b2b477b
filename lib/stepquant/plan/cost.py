"""What one stage takes on one machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """One stage on one machine.

    Attributes:
        stage: Name of the stage, with its expert or variant.
        seconds: Run time.
        host: Peak bytes of host memory.
        device: Peak bytes of each device; 0 if there is none.
        out: Bytes of its out on this machine's disk.
        scratch: Bytes on disk that it needs only while it runs.
    """

    stage: str
    seconds: float
    host: float
    device: float
    out: float
    scratch: float = 0.0
