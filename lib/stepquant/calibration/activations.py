"""Statistics of a site's input, per timestep bin: what smoothing, the branch, GPTQ and the clip are computed from.

One Zarr group per block and site (B bins, K channels); nothing of a held-out prompt enters anything but `heldout.*`:

    shift         [K] float32        about where x lies: the channel means of the first calibration call
    second_moment [K, K] float32     mean over bins of the bin's mean (x - shift)(x - shift)ᵀ (each bin counts the same, however many
                                     steps it has); about the shift, because where channels hardly leave their mean, float32
                                     would lose what they do in the square of the mean
    absmax        [B, K] float32     largest |x| per channel
    mean          [B, K] float32     mean of x per channel
    search.<bin>  [S, K]             a seeded sample of calibration tokens, without replacement
    heldout.<bin> [S, K]             the same from the held-out prompts
    attributes    tokens (calibration tokens seen per bin)
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from stepquant.calibration.arrays import open_group, read_tensor


@dataclass(frozen=True)
class Activations:
    """One site's statistics; see the header for shapes. search and heldout: one tensor per bin."""

    shift: torch.Tensor
    second_moment: torch.Tensor
    absmax: torch.Tensor
    mean: torch.Tensor
    search: list[torch.Tensor]
    heldout: list[torch.Tensor]

    def second_moment_about(self, point: torch.Tensor) -> torch.Tensor:
        """Mean of (x - point)(x - point)ᵀ, float32 [K, K], each bin weighing the same; about 0 it is that of x itself."""
        move, average = point.float() - self.shift, self.mean.mean(0) - self.shift
        cross = average[:, None] * move
        return self.second_moment - cross - cross.T + move[:, None] * move


def read_activations(folder: Path, device: str) -> Activations:
    """Read one site's group onto a device; samples become float32."""
    group = open_group(folder)
    bins = group["absmax"].shape[0]

    def load(name: str) -> torch.Tensor:
        return read_tensor(group, name).to(device, torch.float32)

    return Activations(
        load("shift"), load("second_moment"), load("absmax"), load("mean"),
        [load(f"search.{b}") for b in range(bins)], [load(f"heldout.{b}") for b in range(bins)],
    )


def tokens_per_column(folder: Path) -> float:
    """How many calibration tokens a site's second moments rest on, per channel of its input."""
    group = open_group(folder)
    return sum(group.attrs["tokens"]) / group["absmax"].shape[1]


def site_folder(activations: Path, block: int, site: str) -> Path:
    """Where a site's group lies inside `artifacts/activations/<expert>.zarr`."""
    return activations / block_name(block) / site


def block_name(block: int) -> str:
    return f"block_{block:02d}"
