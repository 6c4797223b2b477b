"""The packed scheduler has the timestep shift that the experts were calibrated with."""

import json
import shutil

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import stepquant
from stepquant.checkpoint.scheduler import with_flow_shift
from stepquant.checkpoint.writer import write_checkpoint
from stepquant.errors import InvalidInput

NO_TEXT = {"text_encoder": None, "tokenizer": None}


def test_a_loaded_checkpoint_samples_at_the_calibrated_shift(packed_pipeline):
    """The source's shift is 5.0."""
    scheduler = stepquant.load_pipeline(packed_pipeline, dtype="float32", **NO_TEXT).scheduler
    expected = FlowMatchEulerDiscreteScheduler(shift=4.0)
    for found in (scheduler, expected):
        found.set_timesteps(5)
    assert scheduler.config.shift == 4.0
    assert torch.equal(scheduler.timesteps, expected.timesteps)


@pytest.mark.parametrize(
    ("scheduler", "key"),
    [
        (
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            "flow_shift",
        ),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "shift"),
    ],
    ids=["multistep", "flow matching"],
)
@pytest.mark.parametrize("left_out", [False, True])
def test_the_key_of_the_class(scheduler, key, left_out, tmp_path):
    """Also where an old config leaves it to the class's default."""
    scheduler.save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    config = json.loads(file.read_text())
    if left_out:
        del config[key]
    changed = with_flow_shift(config, 7.0)
    assert changed == config | {key: 7.0}
    file.write_text(json.dumps(changed))
    loaded = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    assert loaded.config[key] == 7.0


def test_a_scheduler_without_a_shift_is_refused_before_anything_is_written(source, tools, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    diffusers.DDIMScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(InvalidInput, match="DDIMScheduler has no timestep shift, so sampling.flow_shift cannot"):
        write_checkpoint(folder, tmp_path / "out", {}, dtype=torch.float32, flow_shift=5.0)
    assert not (tmp_path / "out").exists()
