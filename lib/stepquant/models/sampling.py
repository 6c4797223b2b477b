"""One way of calling the pipeline, shared by calibration and evaluation: same prompt, image, seed and settings give the
same initial noise for every variant."""

from typing import Any

import torch
from PIL import Image

from stepquant.params import Sampling


def set_flow_shift(pipe: Any, flow_shift: float) -> None:
    """Give the pipeline's scheduler this timestep shift, everything else of it unchanged."""
    key = "flow_shift" if "flow_shift" in pipe.scheduler.config else "shift"
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{key: flow_shift})


def sample(
    pipe: Any, sampling: Sampling, prompt: str, negative_prompt: str, image: Image.Image, seed: int, output_type: str
) -> torch.Tensor:
    """Run the pipeline once. output_type as in diffusers: "pt" gives frames [F, 3, H, W] in 0..1, "np" [F, H, W, 3], "latent" latents.

    The noise is drawn on the CPU, so it does not depend on the device.
    """
    dual = {} if pipe.config.boundary_ratio is None else {"guidance_scale_2": sampling.guidance_scale_2}
    return pipe(
        image=image,
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=sampling.height,
        width=sampling.width,
        num_frames=sampling.num_frames,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        max_sequence_length=sampling.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
        **dual,
    ).frames[0]
