"""What a target says: the part of the recipe that the program which runs a checkpoint can carry."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A program that runs checkpoints, and what its files can carry.

    Attributes:
        name: As in params.yaml, `target.program`.
        program: What users call it.
        formats: Pairs of a weight format and an activation format; None for all pairs.
        hadamard: Kind of the Hadamard matrix (quantize/rotate.py); None for every kind.
        hadamard_sizes: The sizes that a site may have, 0 for none; None for all sizes.
        smoothing: Whether a site's input can be divided by a factor per channel.
        means: Whether a mean can be subtracted from it.
        branch: Whether there is a low-rank branch.
        clip: Whether the dynamic activation scales can be multiplied with a clip.
    """

    name: str
    program: str
    formats: tuple[tuple[str, str], ...] | None
    hadamard: str | None
    hadamard_sizes: tuple[int, ...] | None
    smoothing: bool
    means: bool
    branch: bool
    clip: bool
