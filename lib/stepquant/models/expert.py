"""One expert's weights, as every stage that reads them opens them."""

from stepquant.models.denoiser import Denoiser
from stepquant.models.manifest import ModelManifest
from stepquant.models.source import resolve_source
from stepquant.params import Compute
from stepquant.torch_setup import torch_dtype


def open_expert(manifest: ModelManifest, expert: str, compute: Compute) -> Denoiser:
    """The expert's weights folder, opened lazily, for arithmetic on the device and in the dtype of the params.

    Raises UserError if the model has no such expert, or if its weights are missing or broken.
    """
    folder = resolve_source(manifest.source, manifest.revision) / manifest.expert(expert).subfolder
    return Denoiser(folder, compute.device, torch_dtype(compute.dtype))
