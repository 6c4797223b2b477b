"""A checkpoint loaded onto a device makes the video that it makes on the CPU, as a whole and offloaded."""

import numpy as np
import pytest
import torch
from PIL import Image

import stepquant
from stepquant.checkpoint.writer import write_checkpoint
from stepquant.models.offload import place_pipeline
from tests.device_fixture import ACCELERATORS, assert_as_on_cpu

NO_TEXT = {"text_encoder": None, "tokenizer": None}


@pytest.fixture(scope="module")
def checkpoint(source, tools, tmp_path_factory):
    out = tmp_path_factory.mktemp("devices") / "out"
    settings = {name: tools.settings(name, "nvfp4", "mxfp4", rank=8) for name in tools.edges}
    write_checkpoint(
        source,
        out,
        {name: (s, tools.blocks(source / name, s)) for name, s in settings.items()},
        dtype=torch.float32,
        flow_shift=5.0,
    )
    return out


def video(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 5, 128, generator=generator)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    pipe.set_progress_bar_config(disable=True)
    place = pipe._execution_device
    prompts = {"prompt_embeds": prompt.to(place), "negative_prompt_embeds": -prompt.to(place)}
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    return pipe(image=image, **prompts, **size, generator=generator, output_type="pt").frames


def load(checkpoint, device: str = "cpu"):
    return stepquant.load_pipeline(checkpoint, dtype=torch.float32, device=device, **NO_TEXT)


def test_video_of_a_checkpoint_loaded_onto_the_device(device, checkpoint):
    assert_as_on_cpu(video(load(checkpoint, device)), video(load(checkpoint)), device, rtol=0, atol=0.02)


def test_video_without_offload(device, checkpoint):
    assert_placed(checkpoint, device, "none")


@pytest.mark.parametrize("device", ACCELERATORS, indirect=True)  # compute.offload is refused for a CPU
@pytest.mark.parametrize("offload", ["model", "group"])
def test_video_with_offload(device, checkpoint, offload):
    assert_placed(checkpoint, device, offload)


def assert_placed(checkpoint, device, offload):
    pipe = place_pipeline(load(checkpoint), device, offload)
    assert_as_on_cpu(video(pipe), video(load(checkpoint)), device, rtol=0, atol=0.02)


def test_every_tensor_lies_on_the_device(device, checkpoint):
    pipe = load(checkpoint, device)
    tensors = [t for m in (pipe.transformer, pipe.transformer_2, pipe.vae) for t in [*m.parameters(), *m.buffers()]]
    assert {t.device for t in tensors} == {torch.ones(1, device=device).device}
