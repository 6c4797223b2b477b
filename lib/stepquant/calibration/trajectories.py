"""Recorded denoiser calls: the inputs that the BF16 pipeline gave its experts while it sampled the calibration prompts.

trajectory_files.py has the layout of the artifact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zarr
from torch import Tensor

from stepquant.calibration.recorder import Samples, recorded
from stepquant.calibration.trajectory_files import CONDITION, samples_array, stored_copy, write_trajectory
from stepquant.errors import UserError
from stepquant.models.bins import Bins
from stepquant.models.families import find_family
from stepquant.models.manifest import ModelManifest
from stepquant.models.prompts import Prompt
from stepquant.models.sampling import sample
from stepquant.params import Sampling
from stepquant.storage import object_store
from stepquant.storage.zarr_groups import open_group, read_tensor


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        prompt: id of the prompt.
        split: the prompt's split: calibration, validation or heldout.
        step: index of the sampling step, over both experts.
        branch: guidance branch, 0 for the prompt and 1 for the negative prompt.
        t: timestep; with t per token the largest one, which is that of the tokens being denoised.
    """

    prompt: str
    split: str
    step: int
    branch: int
    t: float


def spread_over_bins(calls: list[Call], bins: Bins, steps: int | None) -> list[Call]:
    """Keep the calls of a few steps per prompt and bin.

    Activations of neighboring steps of a prompt are nearly the same, and at the size of Wan2.2-I2V-A14B each call costs
    a forward of every block and 0.3 GB of hidden states (docs/calibration.md).

    Args:
        calls: recorded calls of one expert.
        bins: the expert's bins.
        steps: number of steps to keep per prompt and bin; None keeps all.

    Returns:
        The calls of the kept steps, which are spread evenly over the recorded ones, in their order.
    """
    if steps is None:
        return calls
    recorded_steps: dict[tuple[str, int], list[int]] = {}
    for call in calls:
        known = recorded_steps.setdefault((call.prompt, bins.index(call.t)), [])
        if call.step not in known:
            known.append(call.step)
    kept = {place: _spread(numbers, steps) for place, numbers in recorded_steps.items()}
    return [call for call in calls if call.step in kept[call.prompt, bins.index(call.t)]]


def _spread(numbers: list[int], count: int) -> set[int]:
    """The middle number of each of `count` equal runs; all numbers if there are no more than `count`."""
    if len(numbers) <= count:
        return set(numbers)
    return {numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)}


def record_prompt(
    pipe: Any, manifest: ModelManifest, sampling: Sampling, prompt: Prompt, folder: Path, url: str | None
) -> None:
    """Sample one prompt and write its trajectory.

    Args:
        pipe: the source pipeline.
        manifest: its description.
        sampling: how it samples.
        prompt: texts, images and seed.
        folder: where the group is written.
        url: the object store into which it is moved; None leaves it on disk.

    Raises:
        UserError: NaN or Inf, calls that cannot be stored (see `write_trajectory`), or an error of the object store.
    """
    experts = {name: getattr(pipe, described.subfolder) for name, described in manifest.experts.items()}
    with recorded(experts) as calls:
        sample(pipe, sampling, prompt.prompt, prompt.negative_prompt, prompt.load_images(), prompt.seed, "latent")
    (channels,) = {described.inputs.out_channels for described in manifest.experts.values()}
    denoiser = find_family(manifest.pipeline).denoiser
    steps = len(pipe.scheduler.timesteps)
    write_trajectory(folder, calls, steps, denoiser, channels, prompt.split, f"prompt {prompt.id}")
    if url is not None:
        object_store.move(folder, url)


class Trajectories:
    """The recorded calls of all prompts, read on request.

    Args:
        folder: `artifacts/trajectories.zarr`.

    Raises:
        UserError: the artifact or a prompt's group is missing or damaged, or of another version.
    """

    def __init__(self, folder: Path):
        root = open_group(folder)
        self._digests: dict[str, str] = dict(root.attrs["prompts"])
        self._groups = {name: open_group(folder / name) for name in self._digests}
        if any("per" not in group.attrs for group in self._groups.values()):
            raise UserError(f"{folder}: not the trajectories of this version; run stage trajectories again")

    def digest(self) -> dict[str, str]:
        """Digest of the content by prompt id, as recorded by the stage that wrote it."""
        return self._digests

    def calls(self, expert: str) -> list[Call]:
        """Every call of one expert, ordered by prompt, step and branch."""
        return [
            Call(prompt, group.attrs["split"], number // group.attrs["branches"], number % group.attrs["branches"], t)
            for prompt, group in self._groups.items()
            for number, t in enumerate(read_tensor(group, "t").tolist())
            if group.attrs["experts"][number] == expert
        ]

    def inputs(self, calls: Sequence[Call]) -> dict[str, Tensor]:
        """The denoiser's arguments in B calls.

        Args:
            calls: some of those that `calls` returns.

        Returns:
            Argument -> values of all calls, one after the other along the first axis.

        Raises:
            UserError: a stored array is missing or damaged, or the calls differ in their arguments or shapes.
        """
        found = [self._arguments(call) for call in calls]
        for call, arguments in zip(calls, found):
            if _shapes(arguments) != _shapes(found[0]):
                raise UserError(
                    f"trajectories: prompts {calls[0].prompt} and {call.prompt} give the denoiser arguments "
                    f"{_shapes(found[0])} and {_shapes(arguments)}; allowed: the same arguments and shapes for all"
                )
        return {name: torch.cat([arguments[name] for arguments in found]) for name in found[0]}

    def _arguments(self, call: Call) -> dict[str, Tensor]:
        group, number = self._groups[call.prompt], self.number(call)
        branches, latents = group.attrs["branches"], group.attrs["latents"]
        stored = {
            name: read_tensor(group, name, stored_copy(level, number, branches))
            for name, level in group.attrs["per"].items()
        }
        condition = stored.pop(f"{latents}.{CONDITION}", None)
        return stored if condition is None else stored | {latents: torch.cat([stored[latents], condition], 1)}

    def number(self, call: Call) -> int:
        """The number of a call in its prompt, over all experts."""
        branches: int = self._groups[call.prompt].attrs["branches"]
        return call.step * branches + call.branch

    def samples(self, call: Call, blocks: int) -> Samples | None:
        """What a call computed.

        Args:
            call: one of those that `calls` returns.
            blocks: number of blocks of its expert.

        Returns:
            The samples; None for made-up calls.

        Raises:
            UserError: a stored array is missing or damaged.
        """
        group, number = self._groups[call.prompt], self.number(call)
        if not group.attrs["sampled"]:
            return None
        expert = group.attrs["experts"][number]
        row = group.attrs["experts"][:number].count(expert)
        found = _row(group, samples_array(expert, "blocks"), row)
        if found.numel() % blocks:
            raise UserError(f"trajectories: prompt {call.prompt} was not recorded with {blocks} blocks of {expert}")
        return Samples(found.view(blocks, -1), _row(group, samples_array(expert, "output"), row))


def _row(group: zarr.Group, name: str, row: int) -> Tensor:
    return read_tensor(group, name, slice(row, row + 1))[0]


def _shapes(arguments: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sorted(arguments.items())}
