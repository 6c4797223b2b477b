"""The sampler's response against the formula of Euler, and against schedulers of diffusers that really sample."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from stepquant.errors import InvalidInput
from stepquant.models.sampler_response import sampler_response

EULER = dict(FlowMatchEulerDiscreteScheduler(shift=5.0).config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
UNIPC = dict(UniPCMultistepScheduler(**FLOW).config) | {"_class_name": "UniPCMultistepScheduler"}


def test_euler_takes_the_difference_of_sigmas():
    response = sampler_response(EULER, 4, 5.0)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(EULER)
    scheduler.set_timesteps(4)
    steps = scheduler.sigmas.double().diff()
    assert len(steps) == 4
    for i in range(5):
        expected = torch.zeros(4, dtype=torch.float64)
        expected[:i] = steps[:i]
        torch.testing.assert_close(response.outputs[i], expected)
    torch.testing.assert_close(response.start, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("steps", [4, 10, 40])
@pytest.mark.parametrize("config", [EULER, UNIPC], ids=["Euler", "UniPC"])
def test_the_weighted_sum_is_what_the_scheduler_samples(config, steps):
    """Random outputs through the scheduler of diffusers itself."""
    response = sampler_response(config, steps, 5.0)
    kind = UniPCMultistepScheduler if config is UNIPC else FlowMatchEulerDiscreteScheduler
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(steps)
    outputs, start = torch.randn(steps, 1, 4, 2, 3, 3, dtype=torch.float64), torch.randn(1, 4, 2, 3, 3).double()
    latents = start
    for i, t in enumerate(scheduler.timesteps):
        latents = scheduler.step(outputs[i], t, latents, return_dict=False)[0]
    expected = torch.tensordot(response.outputs[-1], outputs, dims=1) + response.start[-1] * start
    torch.testing.assert_close(expected, latents.double(), rtol=1e-4, atol=1e-4)


def test_a_sampler_with_a_threshold_is_refused():
    """Thresholding clips latents, which no weighted sum does."""
    with pytest.raises(InvalidInput, match="not linear in the outputs of the denoiser"):
        clipping = UniPCMultistepScheduler(**FLOW, thresholding=True, sample_max_value=1.5).config
        sampler_response(dict(clipping) | {"_class_name": "UniPCMultistepScheduler"}, 4, 5.0)
