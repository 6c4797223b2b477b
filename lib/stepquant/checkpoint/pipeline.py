"""Loads a quantized pipeline folder."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepquant.checkpoint.quantizer import register
from stepquant.errors import DamagedFile, MissingFile
from stepquant.models.weights import open_weights


def load_pipeline(
    folder: str | Path,
    *,
    dtype: torch.dtype | dict[str, torch.dtype],
    device: str | torch.device = "cpu",
    **components: Any,
) -> DiffusionPipeline:
    """Load a checkpoint as a diffusers pipeline, ready to be called.

    Quantized weights stay packed in 4 bits, and the clip follows the `timestep` of every denoiser call. Unquantized
    pipeline folders load as well. Nothing is downloaded.

    Where the pipeline runs is your choice, and it decides the memory that the GPU needs. The sizes are those of
    Wan2.2-I2V-A14B in bfloat16:

    - `device="cpu"` and then `pipe.enable_model_cpu_offload()`: one component at a time is on the GPU. This is the
      right choice for most GPUs. The largest component is the text encoder (11.4 GB); an expert has 8.3 GB.
    - `device="cuda"`: all components are on the GPU, 28.4 GB before the first forward.
    - `pipe.enable_sequential_cpu_offload()` or diffusers' group offloading: parts of a component are on the GPU.
      This needs the least memory and is the slowest.

    Args:
        folder: a diffusers pipeline folder, with a model_index.json; stage pack writes such folders.
        dtype: of everything that is not quantized: one dtype, or one per component with a "default", such as
            {"default": torch.bfloat16, "vae": torch.float32}.
        device: where all components are put after loading. Keep "cpu" if you enable an offload afterwards.
        **components: ready components to use in place of those in the folder, such as text_encoder=None and
            tokenizer=None for a pipeline that is called with prompt embeddings.

    Returns:
        The pipeline, of the class that model_index.json names.

    Raises:
        MissingFile: if the folder is no pipeline folder, or if weights are missing.
        DamagedFile: if a quantized component is truncated, broken or inconsistent.
        UnsupportedCheckpoint: if a quantized component is of another version, or its weights are pickled.
        InvalidInput: if a quantized component's quantization_config has wrong values.

    Example:
        >>> pipe = stepquant.load_pipeline("artifacts/checkpoints/full", dtype=torch.bfloat16)
        >>> pipe.enable_model_cpu_offload()
        >>> video = pipe(image=image, prompt="a dog runs along a beach", height=480, width=832, num_frames=81).frames[0]
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise MissingFile(f"{folder}: no model_index.json; expected a diffusers pipeline folder")
    for config in sorted(folder.glob("*/config.json")):
        if _is_quantized(config):
            open_weights(config.parent)  # the errors of diffusers do not say what is damaged
    register()
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **components)
    return pipeline.to(device)


def _is_quantized(config: Path) -> bool:
    try:
        return "quantization_config" in json.loads(config.read_text())
    except ValueError as error:
        raise DamagedFile(f"{config}: not JSON ({error}); copy or download it again") from None
