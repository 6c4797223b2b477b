"""Loads a quantized pipeline folder."""

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from stepquant.checkpoint.quantizer import register
from stepquant.errors import UserError
from stepquant.models.weights import open_weights


def load_pipeline(
    folder: Path, *, dtype: torch.dtype | dict[str, torch.dtype], device: str | torch.device = "cpu", **components
) -> DiffusionPipeline:
    """The diffusers pipeline in folder, of the class its model_index.json names, ready to be called.

    Works on quantized and unquantized folders alike; nothing is fetched. Quantized weights stay packed, and the clip
    follows the `timestep` of every denoiser call.
    dtype: of everything that is not quantized; one dtype, or by component with a "default", such as
    {"default": torch.bfloat16, "vae": torch.float32}. components: ready ones to use instead of the folder's, such as
    text_encoder=None, tokenizer=None for a pipeline that is given prompt embeddings.
    Raises UserError if folder is no pipeline or a quantized component is damaged or of another version.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: no model_index.json; expected a diffusers pipeline folder")
    for config in sorted(folder.glob("*/config.json")):
        if "quantization_config" in json.loads(config.read_text()):
            open_weights(config.parent)  # diffusers' own errors do not say what is damaged
    register()
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **components)
    return pipeline.to(device)
