"""The programs that run checkpoints, one file each, and the check of a recipe against one of them.

`target.program` in params.yaml names the program. The recipe is searched under what that program can carry, so that an
export only arranges tensors anew: nothing that was solved for is dropped afterwards.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from stepquant.errors import InvalidInput
from stepquant.targets.comfyui_w4a8 import COMFYUI_W4A8
from stepquant.targets.description import Target
from stepquant.targets.stepquant import STEPQUANT

__all__ = ["TARGETS", "Target", "check_recipe"]

TARGETS = {target.name: target for target in (STEPQUANT, COMFYUI_W4A8)}
# Sections of params.yaml that a target can limit.
LIMITED = ("format", "smooth", "center", "rotate", "lowrank", "clip")


def check_recipe(target: Target, sections: Mapping[str, Any], where: str) -> None:
    """Refuse a recipe with something that the target cannot carry.

    Args:
        target: The target.
        sections: The validated sections LIMITED by name, or those of them that are there.
        where: What the message starts with.

    Raises:
        InvalidInput: The first key that asks for more.
    """
    for key, found, allowed, reason in _excesses(target, sections):
        raise InvalidInput(
            f"{where}: {key}: found {found!r}; {target.program} {reason}; allowed with target.program {target.name}: "
            f"{allowed}. `stepquant profile {target.name}` writes a recipe that fits"
        )


def _excesses(target: Target, sections: Mapping[str, Any]) -> Iterator[tuple[str, object, str, str]]:
    """Key, value, allowed value and reason of everything that is too much."""
    formats, smooth, rotate = sections.get("format"), sections.get("smooth"), sections.get("rotate")
    if formats and target.formats is not None and (formats.weight, formats.activation) not in target.formats:
        pairs = " or ".join(" with ".join(pair) for pair in target.formats)
        yield "format.weight, .activation", f"{formats.weight} with {formats.activation}", pairs, "has other formats"
    if smooth and not target.smoothing:
        for key, wanted in (("alpha", 0), ("beta", 0), ("gradient_steps", 0)):
            if getattr(smooth, key) != wanted:
                yield f"smooth.{key}", getattr(smooth, key), str(wanted), "has no smoothing"
    if (center := sections.get("center")) and center.means and not target.means:
        yield "center.means", True, "false", "subtracts no mean"
    if rotate and target.hadamard not in (None, rotate.hadamard):
        yield "rotate.hadamard", rotate.hadamard, str(target.hadamard), "rotates with another matrix"
    sizes = target.hadamard_sizes
    if rotate and sizes is not None and not set(rotate.hadamard_sizes) <= set(sizes):
        yield "rotate.hadamard_sizes", rotate.hadamard_sizes, str(list(sizes)), "rotates other groups of channels"
    if (lowrank := sections.get("lowrank")) and lowrank.rank and not target.branch:
        yield "lowrank.rank", lowrank.rank, "0", "has no low-rank branch"
    if (clip := sections.get("clip")) and not target.clip and (clip.ratios, clip.exponent_offsets) != ([1.0], [0]):
        yield "clip.ratios, .exponent_offsets", clip.ratios, "[1.0] and [0]", "clips nothing"
