"""Asks the scheduler of a pipeline: its timesteps, and whether it samples as calibration assumes.

A scheduler's config has many keys that silently do nothing for some class, so the keys are not read. The scheduler is
built, and made to sample with a velocity that is known exactly: of a flow from noise e to x0 the velocity is e - x0,
and every latent lies on the straight line x(sigma) = (1 - sigma) x0 + sigma e (Lipman et al., "Flow Matching for
Generative Modeling", ICLR 2023; t = sigma x num_train_timesteps). One that predicts something else, adds noise of its
own, clips its latents, or starts at another step leaves this line.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepquant.errors import InvalidInput
from stepquant.models.checks.quiet import quiet

# Largest distance from the line, for x0 and e of unit variance. DEIS integrates numerically and comes to 7e-4; the
# smallest departure of a wrong sampler that was seen is 0.2.
TOLERANCE = 0.01
SHIFT_KEYS = ("flow_shift", "shift")


def sampler_timesteps(config: Mapping[str, Any], steps: int, shift: float) -> list[float]:
    """t of every denoiser call of one branch, from high to low noise.

    Args:
        config: scheduler_config.json of the pipeline.
        steps: `sampling.steps`.
        shift: `sampling.flow_shift`.

    Raises:
        InvalidInput: the scheduler cannot be built, or cannot be set to this number of steps.
    """
    return [float(t) for t in build_scheduler(config, steps, shift).timesteps]


def check_scheduler(config: Mapping[str, Any], steps: int, shift: float) -> None:
    """Refuse a scheduler that does not sample a flow, one call per step, with the given shift.

    Args:
        config: scheduler_config.json of the pipeline.
        steps: `sampling.steps`.
        shift: `sampling.flow_shift`.

    Raises:
        InvalidInput: what the scheduler does instead.
    """
    name = config.get("_class_name")
    t = sampler_timesteps(config, steps, shift)
    if len(t) != steps:
        raise InvalidInput(
            f"scheduler: {name} makes {len(t)} calls in {steps} steps; allowed: schedulers with one call per step, "
            "such as UniPCMultistepScheduler"
        )
    if any(a < b for a, b in zip(t, t[1:])):
        raise InvalidInput(f"scheduler: the timesteps of {name} rise: {listed(t)}; they must fall")
    # One step begins at the largest t whatever the shift is, so more of them are compared.
    few, other = max(steps, 4), shift * 2
    if sampler_timesteps(config, few, shift) == sampler_timesteps(config, few, other):
        raise InvalidInput(
            f"scheduler: sampling.flow_shift does not act on {name}: its timesteps are the same with {shift:g} and "
            f"{other:g}; use a flow matching scheduler, such as UniPCMultistepScheduler with use_flow_sigmas: true"
        )
    _check_flow(config, steps, shift, t)


def _check_flow(config: Mapping[str, Any], steps: int, shift: float, t: list[float]) -> None:
    """Sample with the exact velocity (see above)."""
    name, scheduler = config.get("_class_name"), build_scheduler(config, steps, shift)
    if steps > 1 and t[0] == t[1]:
        raise InvalidInput(
            f"sampling.steps: {steps} steps with sampling.flow_shift {shift:g} begin with t = {t[0]:g} twice, between "
            f"which {name} cannot tell; use fewer steps or a smaller shift"
        )
    sigmas = getattr(scheduler, "sigmas", torch.empty(0)).double()
    largest = scheduler.config.num_train_timesteps
    if len(sigmas) != steps + 1 or any(abs(a - b * largest) > 1.0 for a, b in zip(t, sigmas.tolist())):
        raise InvalidInput(
            f"scheduler: {name} has no t = sigma x {largest}, which the denoiser expects; allowed: flow matching "
            "schedulers, such as UniPCMultistepScheduler with use_flow_sigmas: true"
        )
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 4, 2, 4, 4, generator=generator, dtype=torch.float64)
    latents, velocity = (1 - sigmas[0]) * x0 + sigmas[0] * noise, noise - x0
    for i, step in enumerate(scheduler.timesteps):
        latents = scheduler_step(scheduler, velocity, step, latents)
        away = (latents - ((1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * noise)).abs().max().item()
        if not away <= TOLERANCE:
            does = "gives NaN" if math.isnan(away) else "leaves the flow"
            raise InvalidInput(
                f"scheduler: {name} {does} in step {i + 1} although it is given the exact velocity; allowed: "
                "prediction_type flow_prediction with solver_type bh2, without noise of its own (LCM, SDE, "
                "stochastic_sampling) and without thresholding"
            )


def scheduler_step(scheduler: Any, velocity: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """One step as a pipeline makes it, without a generator: a scheduler that adds noise draws from torch's own."""
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            stepped: torch.Tensor = scheduler.step(velocity, t, latents, return_dict=False)[0]
    except Exception as error:  # of the class's own code
        raise InvalidInput(
            f"scheduler: {type(scheduler).__name__} cannot sample: {' '.join(str(error).split())}"
        ) from None
    return stepped


def build_scheduler(config: Mapping[str, Any], steps: int, shift: float) -> Any:
    """The scheduler with its timesteps set as the pipelines set them: `set_timesteps(steps)` and nothing else."""
    import diffusers

    name = config.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None or not issubclass(found, diffusers.SchedulerMixin):
        raise InvalidInput(f"scheduler: _class_name {name!r}; expected a scheduler of diffusers")
    if config.get("use_dynamic_shifting"):
        raise InvalidInput(
            "scheduler: use_dynamic_shifting: true makes the shift depend on mu, which the pipeline does not pass; "
            "set it to false"
        )
    try:
        with quiet():
            scheduler = found.from_config(dict(config))
            key = next((key for key in SHIFT_KEYS if key in scheduler.config), SHIFT_KEYS[-1])
            scheduler = found.from_config(scheduler.config, **{key: shift})
            scheduler.set_timesteps(steps, device="cpu")
    except Exception as error:  # of the class's own code, which checks its config in many ways
        raise InvalidInput(
            f"scheduler: {name} cannot be set to {steps} steps with flow_shift {shift:g}: "
            f"{' '.join(str(error).split())}"
        ) from None
    return scheduler


def listed(t: Sequence[float]) -> str:
    """The timesteps, with the middle left out if they are many."""
    shown = [f"{value:g}" for value in t]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-3:]])
