"""One way of calling the pipeline, shared by calibration and evaluation: same prompt, image, seed and settings give the
same initial noise for every variant."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from stepquant.models.manifest import ModelManifest
from stepquant.models.source import load_source_pipeline, resolve_source
from stepquant.params import Compute, Sampling
from stepquant.torch_setup import torch_dtype


def source_pipeline(manifest: ModelManifest, compute: Compute, sampling: Sampling) -> Any:
    """The unquantized pipeline of the manifest, ready to sample."""
    folder = resolve_source(manifest.source, manifest.revision)
    return ready_to_sample(lambda: load_source_pipeline(folder, compute.device, torch_dtype(compute.dtype)), sampling)


def ready_to_sample(load: Callable[[], Any], sampling: Sampling) -> Any:
    """What `load` gives, without the progress bars and advice of its libraries, with the timestep shift of the params."""
    quiet_libraries()
    pipe = load()
    set_flow_shift(pipe, sampling.flow_shift)
    return pipe


def quiet_libraries() -> None:
    """Silence the loading bars and advice of diffusers and transformers: a stage prints its own lines."""
    import diffusers
    import transformers

    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


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
