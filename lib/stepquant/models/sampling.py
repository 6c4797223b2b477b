"""Samples a pipeline. Calibration and evaluation call it in the same way.

Equal prompt, image, seed and settings give equal initial noise for every variant.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from stepquant.models.manifest import ModelManifest
from stepquant.models.source import load_source_pipeline, resolve_source
from stepquant.params import Compute, Sampling
from stepquant.torch_setup import torch_dtype


def source_pipeline(manifest: ModelManifest, compute: Compute, sampling: Sampling) -> Any:
    """The unquantized pipeline of a manifest with its LoRAs, ready to sample.

    Raises:
        UserError: as `load_source_pipeline` and `open_expert_weights`.
    """
    folder, experts = resolve_source(manifest.source, manifest.revision), list(manifest.experts.values())
    dtype = torch_dtype(compute.dtype)
    return ready_to_sample(lambda: load_source_pipeline(folder, experts, compute.device, dtype), sampling)


def ready_to_sample(load: Callable[[], Any], sampling: Sampling) -> Any:
    """The pipeline that `load` returns, with the params' timestep shift and without the messages of its libraries."""
    quiet_libraries()
    pipe = load()
    set_flow_shift(pipe, sampling.flow_shift)
    return pipe


def quiet_libraries() -> None:
    """Silence the progress bars and warnings of diffusers and transformers: a stage prints its own progress."""
    import diffusers
    import transformers

    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def set_flow_shift(pipe: Any, flow_shift: float) -> None:
    """Set the timestep shift of the pipeline's scheduler, and keep the rest of its config."""
    key = "flow_shift" if "flow_shift" in pipe.scheduler.config else "shift"
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{key: flow_shift})


def sample(
    pipe: Any, sampling: Sampling, prompt: str, negative_prompt: str, image: Image.Image, seed: int, output_type: str
) -> torch.Tensor:
    """Run the pipeline once.

    Args:
        pipe: a Wan image-to-video pipeline, from `ready_to_sample`.
        sampling: size, steps and guidance scales.
        prompt: what the video should show.
        negative_prompt: what it should not show.
        image: the first frame, of any size.
        seed: of the initial noise, which is drawn on the CPU so that it does not depend on the device.
        output_type: as in diffusers.

    Returns:
        "pt": frames [F, 3, H, W] in 0..1. "np": frames [F, H, W, 3] in 0..1. "latent": latents [C, F, H, W].
    """
    dual = {} if pipe.config.boundary_ratio is None else {"guidance_scale_2": sampling.guidance_scale_2}
    result: torch.Tensor = pipe(
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
    return result
