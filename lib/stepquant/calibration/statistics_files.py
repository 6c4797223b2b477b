"""A site's statistics on disk; recipe/site_statistics.py says what they are.

On disk, one Zarr group per block and site, few files because DVC pays for each (docs/scale.md):

    hessian [K, K] float32
    channels      [1 + 2B, K] float32    shift, absmax of each bin, mean of each bin
    samples       [rows, K]              in the dtype of the arithmetic: search of each bin, then validation, then heldout
    attributes    rows: {name of a sample: its rows}, in order; tokens: calibration tokens seen, per bin
"""

from pathlib import Path

import torch

from stepquant.recipe.site_statistics import SAMPLES, SiteStatistics
from stepquant.storage.zarr_groups import open_group, read_tensor, write_group


def write_statistics(folder: Path, tensors: dict[str, torch.Tensor], tokens: list[int]) -> None:
    """Write one site's group from the tensors in the header, the samples in their order."""
    samples = {name: tensor for name, tensor in tensors.items() if name.startswith(SAMPLES)}
    arrays = {
        "hessian": tensors["hessian"],
        "channels": torch.cat([tensors["shift"][None], tensors["absmax"], tensors["mean"]]),
        "samples": torch.cat(list(samples.values())),
    }
    write_group(folder, arrays, {"rows": {name: len(tensor) for name, tensor in samples.items()}, "tokens": tokens})


def read_statistics(folder: Path, device: str) -> SiteStatistics:
    """One site's group, to be read onto a device; samples become float32. Raises UserError as `open_group` and `read_tensor`."""
    group = open_group(folder)
    bins = len(group.attrs["tokens"])
    places = {"hessian": ("hessian", ...), "shift": ("channels", 0)}
    places |= {"absmax": ("channels", slice(1, 1 + bins)), "mean": ("channels", slice(1 + bins, 1 + 2 * bins))}
    start = 0
    for name, rows in group.attrs["rows"].items():
        places[name] = ("samples", slice(start, start := start + rows))
    return SiteStatistics(lambda name: read_tensor(group, *places[name]).to(device, torch.float32), bins)


def tokens_per_column(folder: Path) -> float:
    """How many calibration tokens a site's second moments rest on, per channel of its input."""
    group = open_group(folder)
    return sum(group.attrs["tokens"]) / group["channels"].shape[1]


def site_folder(activations: Path, block: int, site: str) -> Path:
    """Where a site's group lies inside `artifacts/activations/<expert>.zarr`."""
    return activations / block_name(block) / site


def block_name(block: int) -> str:
    return f"block_{block:02d}"
