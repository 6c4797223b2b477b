"""Files of a site's statistics; recipe/site_statistics.py defines the tensors.

One Zarr group of 7 files per block and site, because DVC has a cost per file (docs/scale.md):

    hessian     [K, K] float32
    channels    [2 + 2B, K] float32    shift, hessian_diagonal, absmax of each bin, mean of each bin
    samples     [rows, K]              in the compute dtype: search of each bin, then validation, then heldout. One file
                                       whose parts are read on their own, so that a sample costs its own bytes only
    attributes  rows: number of rows per sample name, in order; tokens: number of summed calibration tokens per bin
"""

from math import gcd
from pathlib import Path
from typing import Any

import torch

from stepquant.errors import UserError
from stepquant.recipe.site_statistics import SAMPLES, SiteStatistics
from stepquant.storage.zarr_groups import array_shape, open_group, read_tensor, write_group

MIN_PART_ROWS = 64  # parts of fewer rows would take many small reads


def write_statistics(folder: Path, tensors: dict[str, torch.Tensor], tokens: list[int]) -> None:
    """Write one site's group.

    Args:
        folder: the group's folder.
        tensors: the tensors of the header of recipe/site_statistics.py by name; the samples in the order of storage.
            `hessian_diagonal` is taken from `hessian`.
        tokens: number of calibration tokens in the sums, per bin.
    """
    samples = {name: tensor for name, tensor in tensors.items() if name.startswith(SAMPLES)}
    rows = {name: len(tensor) for name, tensor in samples.items()}
    hessian, shift = tensors["hessian"], tensors["shift"]
    arrays = {
        "hessian": hessian,
        "channels": torch.cat([shift[None], hessian.diagonal()[None], tensors["absmax"], tensors["mean"]]),
        "samples": torch.cat(list(samples.values())),
    }
    part_rows = min(max(gcd(*rows.values()), MIN_PART_ROWS), sum(rows.values()))
    write_group(folder, arrays, {"rows": rows, "tokens": tokens}, part_rows={"samples": part_rows})


def read_statistics(folder: Path, device: str | torch.device) -> SiteStatistics:
    """Open one site's group.

    Args:
        folder: the group's folder.
        device: where tensors are put when they are loaded.

    Returns:
        Statistics that read a tensor when it is asked for, as float32.

    Raises:
        UserError: the group is missing, damaged or of another version; damaged arrays are found when they are read.
    """
    group = open_group(folder)
    bins = len(group.attrs["tokens"])
    if array_shape(group, "channels")[0] != 2 + 2 * bins:
        raise UserError(f"{folder}: not the statistics of this version; run stage capture again")
    places: dict[str, tuple[str, Any]] = {
        "hessian": ("hessian", ...),
        "shift": ("channels", 0),
        "hessian_diagonal": ("channels", 1),
        "absmax": ("channels", slice(2, 2 + bins)),
        "mean": ("channels", slice(2 + bins, 2 + 2 * bins)),
    }
    start = 0
    for name, rows in group.attrs["rows"].items():
        places[name] = ("samples", slice(start, start := start + rows))

    def load(name: str) -> torch.Tensor:
        return read_tensor(group, *places[name]).to(device).float()

    return SiteStatistics(load, bins)


def tokens_per_column(folder: Path) -> float:
    """Number of calibration tokens behind a site's Hessian, divided by its number of channels."""
    group = open_group(folder)
    tokens: list[int] = group.attrs["tokens"]
    return sum(tokens) / array_shape(group, "channels")[1]


def site_folder(activations: Path, block: int, site: str) -> Path:
    """The folder of a site's group inside `artifacts/activations/<expert>.zarr`."""
    return activations / block_name(block) / site


def block_name(block: int) -> str:
    """The folder name of a block, such as `block_07`."""
    return f"block_{block:02d}"
