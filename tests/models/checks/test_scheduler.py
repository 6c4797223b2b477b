"""The scheduler is asked, not read: what it does with the exact velocity of a flow decides."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from stepquant.errors import InvalidInput
from stepquant.models.checks.scheduler import check_scheduler, sampler_timesteps

# scheduler_config.json of Wan2.2-I2V-A14B, as far as it differs from the defaults of the class.
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def test_timesteps_are_those_that_a_pipeline_would_use():
    scheduler = UniPCMultistepScheduler.from_config(UNIPC, flow_shift=5.0)
    scheduler.set_timesteps(40)
    assert sampler_timesteps(UNIPC, 40, 5.0) == scheduler.timesteps.tolist()
    assert sampler_timesteps(UNIPC, 4, 5.0) == [999, 937, 833, 625]  # UniPC cuts t to whole numbers
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    assert sampler_timesteps({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 4, 5.0) == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    "config",
    [
        UNIPC,
        UNIPC | {"solver_order": 3},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "DPMSolverMultistepScheduler"} | FLOW,
        {"_class_name": "DEISMultistepScheduler"} | FLOW,
    ],
)
@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (4, 5.0), (40, 5.0), (50, 12.0)])
def test_schedulers_of_a_flow_pass(config, steps, shift):
    check_scheduler(config, steps, shift)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "sampling.flow_shift does not act on LCMScheduler"),
        (UNIPC | {"use_flow_sigmas": False}, "sampling.flow_shift does not act on UniPCMultistepScheduler"),
        ({"_class_name": "DDIMScheduler"}, "sampling.flow_shift does not act on DDIMScheduler"),
        ({"_class_name": "EulerDiscreteScheduler"}, "sampling.flow_shift does not act on EulerDiscreteScheduler"),
        (UNIPC | {"use_dynamic_shifting": True}, "use_dynamic_shifting: true makes the shift depend on mu"),
        (UNIPC | {"prediction_type": "epsilon"}, "UniPCMultistepScheduler leaves the flow in step 1"),
        (UNIPC | {"prediction_type": "v_prediction"}, "UniPCMultistepScheduler leaves the flow in step 1"),
        (UNIPC | {"solver_type": "bh1"}, "UniPCMultistepScheduler gives NaN in step 8"),
        (UNIPC | {"thresholding": True}, "UniPCMultistepScheduler leaves the flow"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "FlowMatchLCMScheduler leaves the flow in step 1"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True},
            "FlowMatchEulerDiscreteScheduler leaves the flow in step 1",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"} | FLOW,
            "DPMSolverMultistepScheduler leaves the flow",
        ),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeunDiscreteScheduler makes 15 calls in 8 steps"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "rise: 0, "),
        (UNIPC | {"_class_name": "UniPC"}, "_class_name 'UniPC'; expected a scheduler of diffusers"),
        (UNIPC | {"_class_name": "WanTransformer3DModel"}, "expected a scheduler of diffusers"),
        ({}, "_class_name None; expected a scheduler of diffusers"),
        (UNIPC | {"solver_type": "unknown"}, "UniPCMultistepScheduler cannot be set to 8 steps with flow_shift 5: "),
        (
            UNIPC | {"predict_x0": False},
            "UniPCMultistepScheduler cannot sample: prediction_type given as flow_prediction must be one of",
        ),
    ],
)
def test_what_does_not_sample_a_flow_is_refused(config, message):
    with pytest.raises(InvalidInput) as caught:
        check_scheduler(config, 8, 5.0)
    assert str(caught.value).startswith("scheduler: ") and message in str(caught.value)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_two_equal_first_timesteps_are_refused(name):
    """The multistep schedulers look their first step up by t, and take the second of two equal ones."""
    with pytest.raises(InvalidInput, match="sampling.steps: 100 steps with sampling.flow_shift 12 begin with t = 999"):
        check_scheduler(UNIPC | {"_class_name": name}, 100, 12.0)
