"""Where the components of a pipeline are while it samples: `compute.offload`, by diffusers' own offloading.

    none    everything on the device
    model   one component at a time on the device, the others in host memory
    group   one block of an expert on the device while the next one is copied there; all weights in host memory
    disk    as group, but the experts' weights are mapped from files, so that host memory holds a block or two

`disk` needs weights that are stored in the compute dtype, because only those can be mapped as they are. Weights of
another dtype, such as the float32 of the published models, and weights with LoRAs are converted into a temporary
folder first, one block at a time. The same bytes reach the device in every mode, so the mode changes no result.
"""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stepquant.models.families.description import DenoiserClass
from stepquant.models.weights import Weights

OFFLOADS = ("none", "model", "group", "disk")  # from the fastest to the one that needs the least memory
STEM = "diffusion_pytorch_model"


def place_pipeline(pipe: Any, device: str, offload: str) -> Any:
    """Hide the pipeline's progress bar and put it where it computes.

    Args:
        pipe: a pipeline on the CPU.
        device: torch device of the computation.
        offload: `compute.offload`.

    Returns:
        The pipeline.
    """
    pipe.set_progress_bar_config(disable=True)
    if offload == "none":
        return pipe.to(device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    target = torch.device(device)
    streams = target.type == "cuda"
    if streams:
        # diffusers creates its stream on the current GPU, and waits for that GPU before it frees a block.
        torch.cuda.set_device(target)
    pipe.enable_group_offload(
        onload_device=target,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=streams,
        # Page-locks a block when it is copied, not all weights in advance, which would also copy mapped ones.
        low_cpu_mem_usage=True,
        # It is small, and group offloading would move its parts to and fro for every latent frame.
        exclude_modules=["vae"],
    )
    return pipe


def load_mapped(denoiser: DenoiserClass, folder: Path, weights: Weights, dtype: torch.dtype, scratch: Path) -> Any:
    """Load an expert whose weights stay on disk: memory is used only for the pages that are being read.

    Args:
        denoiser: class of the expert.
        folder: its folder, with a config.json.
        weights: its weights.
        dtype: of the computation.
        scratch: empty folder for a converted copy. It may be deleted afterwards: on Linux, mapped files keep their
            content until the process ends.

    Returns:
        The expert, as `from_pretrained(folder, dtype=dtype)` of its class gives it.
    """
    if weights.changed or any(weights.dtype(key) != dtype for key in weights if not denoiser.keeps_float32(key)):
        _convert(denoiser, weights, dtype, scratch)
        shutil.copyfile(folder / "config.json", scratch / "config.json")
        folder = scratch
    return denoiser.load().from_pretrained(folder, dtype=dtype, local_files_only=True)


def _convert(denoiser: DenoiserClass, weights: Weights, dtype: torch.dtype, out: Path) -> None:
    """Write the weights as diffusers would load them, in one file per block and one for the rest."""
    places: dict[str, str] = {}
    for number, keys in enumerate(_by_block(weights)):
        name = f"{STEM}-{number:05d}.safetensors"
        stored = {key: weights.get(key) for key in keys}
        tensors = {key: value if denoiser.keeps_float32(key) else value.to(dtype) for key, value in stored.items()}
        save_file(tensors, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(keys, name)
    index = {"metadata": {}, "weight_map": places}
    (out / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


def _by_block(weights: Weights) -> Iterator[list[str]]:
    """The keys of each block, and those outside the blocks."""

    def block(key: str) -> str:
        found = re.match(r"\w+\.\d+\.", key)
        return found[0] if found else ""

    for _, keys in groupby(sorted(weights, key=lambda key: (block(key), key)), key=block):
        yield list(keys)
