"""Loads a quantized pipeline folder."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from stepquant.checkpoint.guards import separate_disk_offload
from stepquant.checkpoint.quantizer import register
from stepquant.errors import InvalidInput, MissingFile
from stepquant.models.configs import read_config
from stepquant.models.weights import open_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = torch.dtype | str


def load_pipeline(
    folder: str | Path,
    *,
    dtype: Dtype | dict[str, Dtype],
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
    - `device="cuda"`: all components are on the GPU, 28.5 GB before the first forward.
    - `pipe.enable_sequential_cpu_offload()` or diffusers' group offloading: parts of a component are on the GPU.
      This needs the least memory and is the slowest.

    Args:
        folder: a diffusers pipeline folder, with a model_index.json; stage pack writes such folders.
        dtype: of everything that is not quantized: torch.float32, torch.bfloat16 or torch.float16, or their names. The
            VAE decodes in float32 all the same, because 16 bits are visible in a video. A dict names each component's
            dtype, with a "default" for the rest, such as {"default": torch.bfloat16, "vae": torch.bfloat16}.
        device: where all components are put after loading. Keep "cpu" if you enable an offload afterwards.
        **components: ready components to use in place of those in the folder, such as text_encoder=None and
            tokenizer=None for a pipeline that is called with prompt embeddings.

    Returns:
        The pipeline, of the class that model_index.json names.

    Raises:
        MissingFile: if the folder is no pipeline folder, or if weights are missing.
        DamagedFile: if a quantized component is truncated, broken or inconsistent.
        UnsupportedCheckpoint: if a quantized component is of another version, or its weights are pickled.
        InvalidInput: if a quantized component's quantization_config has wrong values, or if dtype is no such dtype or
            names a component that the pipeline does not have.

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
    dtypes = _dtypes(dtype, read_config(folder / "model_index.json"))
    register()
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtypes, local_files_only=True, **components)
    for component in pipeline.components.values():
        if isinstance(component, ModelMixin):
            separate_disk_offload(component)
    return pipeline.to(device)


def _is_quantized(config: Path) -> bool:
    return "quantization_config" in read_config(config)


def _dtypes(dtype: Dtype | dict[str, Dtype], index: dict[str, Any]) -> dict[str, torch.dtype]:
    """The dtype of each component that does not have the "default"; index is the content of model_index.json."""
    components = sorted(name for name, value in index.items() if isinstance(value, list))
    if not isinstance(dtype, dict):
        return {"default": _torch_dtype(dtype, "dtype")} | dict.fromkeys({"vae"} & set(components), torch.float32)
    if "default" not in dtype:
        raise InvalidInput(f"dtype: no 'default' among {', '.join(map(repr, dtype))}; expected one")
    if unknown := [name for name in dtype if name not in ("default", *components)]:
        raise InvalidInput(
            f"dtype: the pipeline has no component {unknown[0]!r}; allowed: default, {', '.join(components)}"
        )
    return {name: _torch_dtype(value, f"dtype[{name!r}]") for name, value in dtype.items()}


def _torch_dtype(dtype: object, what: str) -> torch.dtype:
    # diffusers would load anything else as float32.
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        allowed = ", ".join(f"torch.{name}" for name in DTYPES)
        raise InvalidInput(f"{what} is {dtype!r}; allowed: {allowed}, or their names")
    return found
