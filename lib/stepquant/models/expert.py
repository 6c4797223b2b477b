"""Opens the weights of one expert."""

from stepquant.models.denoiser import Denoiser
from stepquant.models.manifest import ModelManifest
from stepquant.models.source import resolve_source
from stepquant.params import Compute
from stepquant.torch_setup import torch_dtype


def open_expert(manifest: ModelManifest, expert: str, compute: Compute) -> Denoiser:
    """Open an expert of the source model. Weights are read when they are used.

    Args:
        manifest: of the source model.
        expert: name of the expert in the manifest.
        compute: device and dtype of the arithmetic.

    Raises:
        UserError: if the model has no such expert, or if its weights are missing or broken.
    """
    folder = resolve_source(manifest.source, manifest.revision) / manifest.expert(expert).subfolder
    return Denoiser(folder, compute.device, torch_dtype(compute.dtype))
