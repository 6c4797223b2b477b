"""Samples a pipeline. Calibration and evaluation call it in the same way.

Equal prompt, image, seed and settings give equal initial noise for every variant.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stepquant.models.families import find_family
from stepquant.models.manifest import ModelManifest
from stepquant.models.pictures import fit_picture
from stepquant.models.source import load_source_pipeline, resolve_source
from stepquant.params import Compute, Sampling


def source_pipeline(manifest: ModelManifest, compute: Compute, sampling: Sampling, scratch: Path) -> Any:
    """The unquantized pipeline of a manifest with its LoRAs, ready to sample.

    Args:
        manifest: of the source model.
        compute: device, dtype and offload.
        sampling: whose timestep shift is set.
        scratch: an empty folder, which may be deleted afterwards.

    Raises:
        UserError: as `load_source_pipeline`.
    """
    folder, experts = resolve_source(manifest.source, manifest.revision), list(manifest.experts.values())
    return ready_to_sample(lambda: load_source_pipeline(folder, experts, compute, scratch), sampling)


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


def guidance(sampling: Sampling, expert: int) -> float:
    """Scale of classifier-free guidance of the first (0) or second (1) expert."""
    return (sampling.guidance_scale, sampling.guidance_scale_2)[expert]


def sample(
    pipe: Any,
    sampling: Sampling,
    prompt: str,
    negative_prompt: str,
    images: Mapping[str, Image.Image],
    seed: int,
    output_type: str,
) -> torch.Tensor:
    """Run the pipeline once.

    Args:
        pipe: a pipeline of a known class (models/families), from `ready_to_sample`.
        sampling: size, steps and guidance scales.
        prompt: what the video should show.
        negative_prompt: what it should not show.
        images: of any size, by their names in the pipeline's call; none for text-to-video. The middle of each is used
            (`fit_picture`).
        seed: of the initial noise, which is drawn on the CPU so that it does not depend on the device.
        output_type: as in diffusers.

    Returns:
        "pt": frames [F, 3, H, W] in 0..1. "np": frames [F, H, W, 3] in 0..1. "latent": latents [C, F, H, W].
    """
    result: torch.Tensor = pipe(
        prompt=prompt,
        negative_prompt=negative_prompt,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
        **{name: fit_picture(image, sampling.height, sampling.width) for name, image in images.items()},
        **find_family(type(pipe).__name__).call(sampling, pipe.config),
    ).frames[0]
    return result
