"""Writes the recorded calls of one prompt without repetitions.

One Zarr group per prompt id (R = 2 guidance branches with guidance, 1 without; call number = step x R + branch):

    <argument>                  every tensor argument of the denoiser's forward, under its name, once per prompt, per
                                branch, per step or per call: the fewest copies that give back all calls exactly,
                                [copies, *shape]
    <latents>.condition         the channels of the latents' argument that are conditions (mask, image latents), stored
                                as an argument of their own; absent without such channels
    t                           [calls] float32, the largest t over the tokens
    samples.<expert>.blocks     [calls of the expert, blocks x values], of every block's output (recorder.py)
    samples.<expert>.output     [calls of the expert, values], of the denoiser's output
    attributes                  split; branches: R; experts: the expert's name per call; per: what each argument is
                                stored once for; latents: name of the latents' argument; sampled: whether there are
                                samples
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stepquant.calibration.recorder import RecordedCall
from stepquant.errors import UserError
from stepquant.models.families.description import DenoiserClass
from stepquant.storage.zarr_groups import write_group

CONDITION = "condition"  # suffix of the array
LEVELS = ("prompt", "branch", "step", "call")


def samples_array(expert: str, kind: str) -> str:
    """Name of the array with samples of an expert's calls. kind: blocks or output."""
    return f"samples.{expert}.{kind}"


def write_trajectory(
    folder: Path,
    calls: Sequence[RecordedCall],
    steps: int,
    denoiser: DenoiserClass,
    latent_channels: int,
    split: str,
    where: str,
) -> None:
    """Store one prompt's recorded calls.

    Steps are told apart by their number and not by t, because neighboring steps of a sampler with integer timesteps can
    have the same t.

    Args:
        folder: where the group is written.
        calls: from `recorded`; step by step, the branches of a step after each other.
        steps: number of sampling steps.
        denoiser: class of the experts.
        latent_channels: number of leading channels of the latents' argument that are latents.
        split: the prompt's split.
        where: what an error message names.

    Raises:
        UserError: NaN or Inf, a number of calls that differs between steps, or calls that differ in their arguments or
            in a shape.
    """
    branches = _branches(len(calls), steps, where)
    _check_shapes(calls, denoiser, where)
    arrays = {name: [call.arguments[name] for call in calls] for name in calls[0].arguments}
    latents = arrays[denoiser.latents]
    arrays[denoiser.latents] = [tensor[:, :latent_channels] for tensor in latents]
    if latents[0].shape[1] > latent_channels:
        arrays[f"{denoiser.latents}.{CONDITION}"] = [tensor[:, latent_channels:] for tensor in latents]
    _check_finite(arrays, where)
    tensors = {"t": torch.tensor([float(call.arguments[denoiser.timestep].max()) for call in calls])}
    per = {}
    for name, values in arrays.items():
        per[name], copies = _distinct(values, branches)
        tensors[name] = torch.stack([values[i] for i in copies])
    samples = _samples(calls, where)
    attributes = {
        "split": split,
        "branches": branches,
        "experts": [call.expert for call in calls],
        "per": per,
        "latents": denoiser.latents,
        "sampled": bool(samples),
    }
    write_group(folder, tensors | samples, attributes, part_rows=dict.fromkeys(samples, 1))


def _branches(calls: int, steps: int, where: str) -> int:
    """Calls per step."""
    if calls == 0 or calls % steps:
        raise UserError(
            f"{where}: the pipeline called its denoisers {calls} times in {steps} steps; allowed: the same number of "
            "calls in every step, 1 without and 2 with guidance; use a pipeline with the same guidance in all steps"
        )
    return calls // steps


def _check_shapes(calls: Sequence[RecordedCall], denoiser: DenoiserClass, where: str) -> None:
    """All calls must have the same arguments, of the same shapes and dtypes, and be for one video."""
    described = [{name: (tuple(x.shape), x.dtype) for name, x in call.arguments.items()} for call in calls]
    for number, found in enumerate(described, 1):
        if differing := [name for name in found | described[0] if found.get(name) != described[0].get(name)]:
            raise UserError(
                f"{where}: call {number} has another {differing[0]} than call 1, "
                f"{found.get(differing[0])} and {described[0].get(differing[0])}; "
                "allowed: calls with the same arguments, shapes and dtypes"
            )
    if (batch := calls[0].arguments[denoiser.latents].shape[0]) != 1:
        raise UserError(f"{where}: the pipeline calls its denoiser with a batch of {batch}; allowed: 1")


def _check_finite(arrays: dict[str, list[Tensor]], where: str) -> None:
    """Names what was not finite first: in later calls it has spread."""
    for number in range(len(next(iter(arrays.values())))):
        for name, values in arrays.items():
            if not torch.isfinite(values[number]).all():
                raise UserError(
                    f"{where}: the pipeline gave its denoiser {name} with NaN or Inf; "
                    "check the model, or use another compute.dtype"
                )


def _distinct(values: list[Tensor], branches: int) -> tuple[str, list[int]]:
    """The fewest calls whose values give back those of all calls.

    Args:
        values: one per call.
        branches: calls per step.

    Returns:
        "prompt", "branch", "step" or "call", and the numbers of the calls.
    """
    calls = range(len(values))
    places = {level: [stored_copy(level, number, branches) for number in calls] for level in LEVELS}
    for level in sorted(LEVELS, key=lambda level: len(set(places[level]))):
        copies = [places[level].index(copy) for copy in range(max(places[level]) + 1)]
        if all(torch.equal(values[number], values[copies[places[level][number]]]) for number in calls):
            return level, copies
    raise AssertionError("a copy per call gives back all calls")


def stored_copy(level: str, number: int, branches: int) -> int:
    """Which copy of an argument a call has.

    Args:
        level: what the argument is stored once for.
        number: of the call, step x branches + branch.
        branches: calls per step.
    """
    return {"prompt": 0, "branch": number % branches, "step": number // branches, "call": number}[level]


def _samples(calls: Sequence[RecordedCall], where: str) -> dict[str, Tensor]:
    """The arrays with samples of every expert's calls; none for made-up calls."""
    found = {}
    for expert in dict.fromkeys(call.expert for call in calls):
        samples = [call.samples for call in calls if call.expert == expert and call.samples is not None]
        if samples:
            found[samples_array(expert, "blocks")] = torch.stack([sample.blocks.flatten() for sample in samples])
            found[samples_array(expert, "output")] = torch.stack([sample.output for sample in samples])
    if not all(torch.isfinite(tensor).all() for tensor in found.values()):
        raise UserError(f"{where}: a denoiser computed NaN or Inf; check the model, or use another compute.dtype")
    return found
