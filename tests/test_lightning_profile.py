"""The profile of Lightning LoRAs, against the schedulers of diffusers."""

import pytest
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from stepquant import profiles
from stepquant.models.bins import expert_bins

PARAMS = yaml.safe_load(profiles.choose(profiles.read_profiles(), "wan2.2-i2v-a14b-lightning"))
SHIFT = PARAMS["sampling"]["flow_shift"]
SCHEDULERS = {  # scheduler_config.json of Wan-AI/Wan2.2-I2V-A14B-Diffusers, and the Euler steps that Lightning names
    "UniPC": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
    "Euler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_step_has_a_bin_of_its_own_two_in_each_expert(name):
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(PARAMS["sampling"]["steps"])
    t = scheduler.timesteps.tolist()
    found = {"high_noise": [value for value in t if value >= 900], "low_noise": [value for value in t if value < 900]}
    for (expert, steps), t_range in zip(found.items(), ((900, 1000), (0, 900))):
        bins = expert_bins(PARAMS["bins"], expert, t_range)
        assert [bins.index(value) for value in steps] == [0, 1] and bins.count == 2


def test_both_experts_have_a_lora_and_no_guidance():
    assert [lora["expert"] for lora in PARAMS["model"]["loras"]] == ["high_noise", "low_noise"]
    assert PARAMS["sampling"]["guidance_scale"] == PARAMS["sampling"]["guidance_scale_2"] == 1.0
