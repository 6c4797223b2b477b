"""Opens the weights of one expert."""

from stepquant.models.denoiser import Denoiser
from stepquant.models.loras import open_expert_weights
from stepquant.models.manifest import ModelManifest
from stepquant.models.source import resolve_source
from stepquant.params import Compute
from stepquant.torch_setup import torch_dtype


def open_expert(manifest: ModelManifest, expert: str, compute: Compute) -> Denoiser:
    """Open an expert of the source model, with its LoRAs. Weights are read when they are used.

    Args:
        manifest: of the source model.
        expert: name of the expert in the manifest.
        compute: device and dtype of the arithmetic.

    Raises:
        UserError: if the model has no such expert, or if its weights or LoRAs are missing, broken or changed.
    """
    folder, described = resolve_source(manifest.source, manifest.revision), manifest.expert(expert)
    weights = open_expert_weights(folder, described)
    return Denoiser(folder / described.subfolder, compute.device, torch_dtype(compute.dtype), weights)
