"""Recorded denoiser calls: the inputs that the BF16 pipeline gave its experts while it sampled the calibration prompts.

One Zarr group per prompt id (S steps, R = 2 guidance branches with guidance, 1 without):

    latents      [S, C, F, H, W]    the noisy part of the input, the same for all branches of a step
    condition    [P, F, H, W]       mask and image latents, the same at every step (P = 0 without an image)
    embeddings   [R, L, text_dim]   text embeddings: prompt, then negative prompt
    timesteps    [S] float32        t as the denoiser received it
    attributes   split, experts (the expert's name per step)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepquant.errors import UserError
from stepquant.models.bins import Bins
from stepquant.models.prompts import Prompt
from stepquant.models.sampling import sample
from stepquant.params import Sampling
from stepquant.storage import object_store
from stepquant.storage.zarr_groups import array_shape, open_group, read_tensor, write_group

INPUTS = ("hidden_states", "timestep", "encoder_hidden_states")


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        prompt: id of the prompt.
        split: the prompt's split: calibration, validation or heldout.
        step: index of the sampling step, over both experts.
        branch: guidance branch, 0 for the prompt and 1 for the negative prompt.
        t: timestep.
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


@contextmanager
def recorded(experts: dict[str, torch.nn.Module]) -> Iterator[list[dict[str, Any]]]:
    """Record the inputs of every call of some experts.

    Args:
        experts: modules by expert name.

    Yields:
        A list that grows by one entry per call made inside the `with` block: "expert", and copies of the arguments
        `INPUTS` on the CPU.
    """
    calls: list[dict[str, Any]] = []

    def hook(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append({"expert": name} | {key: kwargs[key].detach().cpu().clone() for key in INPUTS})

        return record

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in experts.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def record_prompt(pipe: Any, sampling: Sampling, prompt: Prompt, folder: Path, url: str | None) -> None:
    """Sample one prompt and write its trajectory.

    Args:
        pipe: the source pipeline.
        sampling: how it samples.
        prompt: text, image and seed.
        folder: where the group is written.
        url: the object store into which it is moved; None leaves it on disk.

    Raises:
        UserError: NaN or Inf, calls that cannot be stored (see `write_trajectory`), or an error of the object store.
    """
    experts = (
        {"high_noise": pipe.transformer, "low_noise": pipe.transformer_2}
        if pipe.transformer_2
        else {"denoiser": pipe.transformer}
    )
    with recorded(experts) as calls:
        sample(pipe, sampling, prompt.prompt, prompt.negative_prompt, prompt.load_image(), prompt.seed, "latent")
    steps, channels = len(pipe.scheduler.timesteps), pipe.transformer.config.out_channels
    write_trajectory(folder, calls, steps, channels, prompt.split, f"prompt {prompt.id}")
    if url is not None:
        object_store.move(folder, url)


def write_trajectory(
    folder: Path, calls: list[dict[str, Any]], steps: int, latent_channels: int, split: str, where: str
) -> None:
    """Store one prompt's recorded calls without repetitions.

    Steps are told apart by their number and not by t, because neighboring steps of a sampler with integer timesteps can
    have the same t.

    Args:
        folder: where the group is written.
        calls: from `recorded`, batch 1 each; step by step, the branches of a step after each other.
        steps: number of sampling steps.
        latent_channels: number of leading channels of hidden_states that are latents.
        split: the prompt's split.
        where: what an error message names.

    Raises:
        UserError: NaN or Inf, a number of calls that differs between steps, or an input that changes within a step (or
            a condition or text embedding that changes between steps).
    """
    branches = _branches(len(calls), steps, where)
    first = calls[::branches]
    tensors = {
        "embeddings": torch.cat([call["encoder_hidden_states"] for call in calls[:branches]]),
        "latents": torch.stack([call["hidden_states"][0, :latent_channels] for call in first]),
        "condition": calls[0]["hidden_states"][0, latent_channels:],
        "timesteps": torch.tensor([_timestep(call) for call in first], dtype=torch.float32),
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{where}: the pipeline gave its denoiser {name} with NaN or Inf; "
                "check the model, or use another compute.dtype"
            )
    _check_repetitions(calls, branches, latent_channels, where)
    write_group(folder, tensors, {"split": split, "experts": [call["expert"] for call in first]})


def _branches(calls: int, steps: int, where: str) -> int:
    """Calls per step."""
    if calls == 0 or calls % steps:
        raise UserError(
            f"{where}: the pipeline called its denoisers {calls} times in {steps} steps; allowed: the same number of "
            "calls in every step, 1 without and 2 with guidance; use a pipeline with the same guidance in all steps"
        )
    return calls // steps


def _timestep(call: dict[str, Any]) -> float:
    return float(call["timestep"].flatten()[0])


def _check_repetitions(calls: list[dict[str, Any]], branches: int, latent_channels: int, where: str) -> None:
    """What is stored once must be equal in all the calls that share it."""
    for i, call in enumerate(calls):
        step, branch = divmod(i, branches)
        first = calls[step * branches]
        of_step = call["expert"] == first["expert"] and _timestep(call) == _timestep(first)
        of_step = of_step and torch.equal(call["hidden_states"], first["hidden_states"])
        condition, conditions = (c["hidden_states"][:, latent_channels:] for c in (call, calls[0]))
        text, texts = (c["encoder_hidden_states"] for c in (call, calls[branch]))
        if not (of_step and torch.equal(condition, conditions) and torch.equal(text, texts)):
            raise UserError(
                f"{where}: call {branch + 1} of step {step + 1} does not fit the others; allowed: {branches} calls "
                "per step with the same expert, t and latents; condition and text embeddings that stay the same"
            )


class Trajectories:
    """The recorded calls of all prompts, read on request.

    Args:
        folder: `artifacts/trajectories.zarr`.

    Raises:
        UserError: the artifact or a prompt's group is missing or damaged.
    """

    def __init__(self, folder: Path):
        root = open_group(folder)
        self._digests: dict[str, str] = dict(root.attrs["prompts"])
        self._groups = {name: open_group(folder / name) for name in self._digests}

    def digest(self) -> dict[str, str]:
        """Digest of the content by prompt id, as recorded by the stage that wrote it."""
        return self._digests

    def calls(self, expert: str) -> list[Call]:
        """Every call of one expert, ordered by prompt, step and branch."""
        return [
            Call(prompt, group.attrs["split"], step, branch, t)
            for prompt, group in self._groups.items()
            for step, t in enumerate(read_tensor(group, "timesteps").tolist())
            if group.attrs["experts"][step] == expert
            for branch in range(array_shape(group, "embeddings")[0])
        ]

    def inputs(self, calls: list[Call]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The inputs of B calls.

        Args:
            calls: some of those that `calls` returns.

        Returns:
            hidden_states [B, C + P, F, H, W], timestep [B] float32, and encoder_hidden_states [B, L, text_dim].

        Raises:
            UserError: a stored array is missing or damaged.
        """
        conditions = {
            prompt: read_tensor(self._groups[prompt], "condition") for prompt in {call.prompt for call in calls}
        }
        hidden, text = [], []
        for call in calls:
            group = self._groups[call.prompt]
            latents = read_tensor(group, "latents", call.step)
            hidden.append(torch.cat([latents, conditions[call.prompt]]))
            text.append(read_tensor(group, "embeddings", call.branch))
        return torch.stack(hidden), torch.tensor([call.t for call in calls]), torch.stack(text)
