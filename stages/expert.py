"""One expert's weights, as every stage that reads them opens them."""

from typing import Any

from stages.common import dtype_of
from stepquant.errors import UserError
from stepquant.models.denoiser import Denoiser
from stepquant.models.source import resolve_source
from stepquant.params import Compute


def check_expert(manifest: dict[str, Any], expert: str) -> None:
    """Raises UserError unless the model of the manifest has this expert."""
    if expert not in manifest["experts"]:
        raise UserError(f"--expert {expert}: this model has {', '.join(manifest['experts'])}")


def open_expert(manifest: dict[str, Any], expert: str, compute: Compute) -> Denoiser:
    """The expert's weights folder, opened lazily, for arithmetic on the device and in the dtype of the params."""
    folder = resolve_source(manifest["source"], manifest["revision"])
    return Denoiser(folder / manifest["experts"][expert]["subfolder"], compute.device, dtype_of(compute.dtype))
