"""How a sampler's latents depend on what the denoiser gives in each step, asked from the scheduler.

Schedulers of flow matching are linear: every latent is a weighted sum of the initial latent and of the denoiser's
outputs so far. The weights are the scheduler's answers to outputs that are zero in all steps but one, so no formula of
one sampler is assumed: Euler gives sigma[i+1] - sigma[i], and multistep samplers (UniPC) have terms of earlier steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import InvalidInput
from stepquant.models.checks.scheduler import build_scheduler, scheduler_step

# Largest relative difference between the scheduler's own latents and the weighted sums.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class SamplerResponse:
    """The derivatives of a sampler's latents.

    Attributes:
        outputs: float64 [steps + 1, steps]: of the latent before step i (the final latent for i = steps) by the
            output of step j.
        start: float64 [steps + 1]: of the same latents by the initial latent.
    """

    outputs: Tensor
    start: Tensor


def sampler_response(config: Mapping[str, Any], steps: int, shift: float) -> SamplerResponse:
    """Ask a scheduler for its response.

    Args:
        config: scheduler_config.json of the pipeline.
        steps: `sampling.steps`.
        shift: `sampling.flow_shift`.

    Raises:
        InvalidInput: the scheduler cannot be built, or its latents are no weighted sums of the outputs.
    """
    # One row per probe: an output of one in each step, an initial latent of one, and random outputs as a check.
    outputs = torch.zeros(steps, steps + 2, dtype=torch.float64)
    outputs[:, :steps] = torch.eye(steps, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    outputs[:, -1] = torch.randn(steps, generator=generator, dtype=torch.float64)
    initial = torch.zeros(steps + 2, dtype=torch.float64)
    initial[steps] = 1
    initial[-1] = torch.randn(1, generator=generator, dtype=torch.float64).item()
    latents = _latents(config, steps, shift, outputs, initial)
    response = SamplerResponse(latents[:, :steps], latents[:, steps])
    expected = response.outputs @ outputs[:, -1] + response.start * initial[-1]
    away = (expected - latents[:, -1]).abs().max() / latents[:, -1].abs().max()
    if not away <= TOLERANCE:
        raise InvalidInput(
            f"scheduler: the latents of {config.get('_class_name')} are not linear in the outputs of the denoiser "
            f"({away:.1g} away); stage sensitivity needs a linear sampler, such as UniPCMultistepScheduler"
        )
    return response


def _latents(config: Mapping[str, Any], steps: int, shift: float, outputs: Tensor, initial: Tensor) -> Tensor:
    """The latent before every step, and the final one, [steps + 1, probes], for outputs [steps, probes].

    Every probe is sampled on its own: samplers may use norms over the whole latent.
    """
    found = []
    for n in range(outputs.shape[1]):
        scheduler, latent = build_scheduler(config, steps, shift), initial[n].view(1, 1, 1, 1, 1)
        values = [latent]
        for t, output in zip(scheduler.timesteps, outputs[:, n]):
            latent = scheduler_step(scheduler, output.view(1, 1, 1, 1, 1), t, latent)
            values.append(latent)
        found.append(torch.stack([value.reshape(()) for value in values]))
    return torch.stack(found, dim=1)
