"""Recorded denoiser calls: what the BF16 pipeline gave to its experts while it sampled the calibration prompts.

One Zarr group per prompt id (S steps, R = 2 branches with guidance, 1 without):

    latents      [S, C, F, H, W]    the noisy part of the input, the same for both branches of a step
    condition    [P, F, H, W]       mask and image latents, the same at every step (P = 0 without an image)
    embeddings   [R, L, text_dim]   text embeddings: prompt, then negative prompt
    timesteps    [S] float32        t as the denoiser got it
    attributes   split, experts (the expert's name per step)
"""

from collections.abc import Iterator
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
from stepquant.storage.zarr_groups import open_group, read_tensor, write_group


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: which prompt, step and guidance branch (0: prompt, 1: negative prompt), and at which t."""

    prompt: str
    split: str
    step: int
    branch: int
    t: float


def spread_over_bins(calls: list[Call], bins: Bins, steps: int | None) -> list[Call]:
    """The calls of at most `steps` steps of each prompt in each bin, spread evenly over the recorded ones; None keeps all.

    Neighbouring steps of a prompt show nearly the same activations, and at the real size each call costs a forward of every block
    and 0.3 GB of hidden states (docs/calibration.md).
    """
    if steps is None:
        return calls
    recorded: dict[tuple[str, int], list[int]] = {}
    for call in calls:
        known = recorded.setdefault((call.prompt, bins.index(call.t)), [])
        if call.step not in known:
            known.append(call.step)
    kept = {place: _spread(numbers, steps) for place, numbers in recorded.items()}
    return [call for call in calls if call.step in kept[call.prompt, bins.index(call.t)]]


def _spread(numbers: list[int], count: int) -> set[int]:
    """`count` of the numbers, one from the middle of each of as many equal runs; all of them if there are no more."""
    if len(numbers) <= count:
        return set(numbers)
    return {numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)}


@contextmanager
def recorded(experts: dict[str, torch.nn.Module]) -> Iterator[list[dict[str, Any]]]:
    """Collect the inputs of every call of the experts (name -> module) made inside the block, in order."""
    calls: list[dict[str, Any]] = []

    def hook(name: str):
        def record(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            keys = ("hidden_states", "timestep", "encoder_hidden_states")
            calls.append({"expert": name} | {key: kwargs[key].detach().cpu().clone() for key in keys})

        return record

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in experts.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def record_prompt(pipe: Any, sampling: Sampling, prompt: Prompt, folder: Path, url: str | None) -> None:
    """Sample one prompt and write its trajectory into a folder; url: the object store to move it into, None for the disk."""
    experts = (
        {"high_noise": pipe.transformer, "low_noise": pipe.transformer_2}
        if pipe.transformer_2
        else {"denoiser": pipe.transformer}
    )
    with recorded(experts) as calls:
        sample(pipe, sampling, prompt.prompt, prompt.negative_prompt, prompt.load_image(), prompt.seed, "latent")
    write_trajectory(folder, calls, pipe.transformer.config.out_channels, prompt.split, f"prompt {prompt.id}")
    if url is not None:
        object_store.move(folder, url)


def write_trajectory(folder: Path, calls: list[dict[str, Any]], latent_channels: int, split: str, where: str) -> None:
    """Store one prompt's recorded calls (batch 1 each), dropping what is the same in all of them.

    where: what an error names. Raises UserError for NaN or Inf.
    """
    times = [float(call["timestep"].flatten()[0]) for call in calls]
    first = [i for i, t in enumerate(times) if i == 0 or t != times[i - 1]]
    branches = len(calls) // len(first)
    inputs = [calls[i]["hidden_states"][0] for i in first]
    tensors = {
        "embeddings": torch.cat([call["encoder_hidden_states"] for call in calls[:branches]]),
        "latents": torch.stack([x[:latent_channels] for x in inputs]),
        "condition": inputs[0][latent_channels:],
        "timesteps": torch.tensor([times[i] for i in first], dtype=torch.float32),
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{where}: the pipeline gave its denoiser {name} with NaN or Inf; check the model, or use another compute.dtype"
            )
    write_group(folder, tensors, {"split": split, "experts": [calls[i]["expert"] for i in first]})


class Trajectories:
    """The recorded calls of all prompts, read lazily."""

    def __init__(self, folder: Path):
        root = open_group(folder)
        self._digests: dict[str, str] = dict(root.attrs["prompts"])
        self._groups = {name: open_group(folder / name) for name in self._digests}

    def digest(self) -> dict[str, str]:
        """Digest of the content per prompt, as the stage that wrote it recorded."""
        return self._digests

    def calls(self, expert: str) -> list[Call]:
        """Every call of one expert, by prompt, step and branch."""
        return [
            Call(prompt, group.attrs["split"], step, branch, t)
            for prompt, group in self._groups.items()
            for step, t in enumerate(read_tensor(group, "timesteps").tolist())
            if group.attrs["experts"][step] == expert
            for branch in range(group["embeddings"].shape[0])
        ]

    def inputs(self, calls: list[Call]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states [B, C + P, F, H, W], timestep [B] and encoder_hidden_states [B, L, text_dim] of some calls."""
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
