"""Statistics of a site's input, per timestep bin: what smoothing, the branch, GPTQ and the clip are computed from.

Of one site (B bins, K channels); nothing of a held-out prompt enters anything but `heldout.*`:

    shift         [K]       about where x lies: the channel means of the first calibration call
    second_moment [K, K]    mean over bins of the bin's mean (x - shift)(x - shift)ᵀ (each bin counts the same, however many
                            steps it has); about the shift, because where channels hardly leave their mean, float32
                            would lose what they do in the square of the mean
    absmax        [B, K]    largest |x| per channel
    mean          [B, K]    mean of x per channel
    search.<bin>      [S, K]    a seeded sample of calibration tokens, without replacement
    validation.<bin>  [S, K]    the same from the validation prompts, which nothing else is computed from: choices are judged by them
    heldout.<bin>     [S, K]    the same from the held-out prompts

On disk, one Zarr group per block and site, few files because DVC pays for each (docs/scale.md):

    second_moment [K, K] float32
    channels      [1 + 2B, K] float32    shift, absmax of each bin, mean of each bin
    samples       [rows, K]              in the dtype of the arithmetic: search of each bin, then validation, then heldout
    attributes    rows: {name of a sample: its rows}, in order; tokens: calibration tokens seen, per bin
"""

from collections.abc import Callable
from pathlib import Path

import torch

from stepquant.calibration.arrays import open_group, read_tensor, write_group

SAMPLES = ("search", "validation", "heldout")
FEW_TOKENS = 4  # per column: with fewer, second moments are warned of (docs/calibration.md)


class Activations:
    """One site's statistics; see the header for shapes. A tensor is loaded when it is asked for, and not kept.

    At 13,824 channels second moments and samples are 1.4 GB, of which no stage needs all.
    """

    def __init__(self, load: Callable[[str], torch.Tensor], bins: int):
        """load: gives a tensor of the header by its name, float32."""
        self.load, self.bins = load, bins

    @property
    def shift(self) -> torch.Tensor:
        return self.load("shift")

    @property
    def second_moment(self) -> torch.Tensor:
        return self.load("second_moment")

    @property
    def absmax(self) -> torch.Tensor:
        return self.load("absmax")

    @property
    def mean(self) -> torch.Tensor:
        return self.load("mean")

    @property
    def search(self) -> list[torch.Tensor]:
        """One tensor per bin."""
        return [self.load(f"search.{b}") for b in range(self.bins)]

    @property
    def validation(self) -> list[torch.Tensor]:
        """One tensor per bin."""
        return [self.load(f"validation.{b}") for b in range(self.bins)]

    @property
    def heldout(self) -> list[torch.Tensor]:
        """One tensor per bin."""
        return [self.load(f"heldout.{b}") for b in range(self.bins)]

    def second_moment_about(self, point: torch.Tensor) -> torch.Tensor:
        """Mean of (x - point)(x - point)ᵀ, float32 [K, K], each bin weighing the same; about 0 it is that of x itself."""
        shift = self.shift
        move, average = point.float() - shift, self.mean.mean(0) - shift
        return self.second_moment.addr(average - move, move, alpha=-1).addr_(move, average, alpha=-1)

    def variance_about(self, point: torch.Tensor) -> torch.Tensor:
        """The diagonal of `second_moment_about`, [K]; rounding may leave it just below zero."""
        shift = self.shift
        move, average = point.float() - shift, self.mean.mean(0) - shift
        return self.second_moment.diagonal() - 2 * average * move + move.square()


def write_activations(folder: Path, tensors: dict[str, torch.Tensor], tokens: list[int]) -> None:
    """Write one site's group from the tensors in the header, the samples in their order."""
    samples = {name: tensor for name, tensor in tensors.items() if name.startswith(SAMPLES)}
    arrays = {
        "second_moment": tensors["second_moment"],
        "channels": torch.cat([tensors["shift"][None], tensors["absmax"], tensors["mean"]]),
        "samples": torch.cat(list(samples.values())),
    }
    write_group(folder, arrays, {"rows": {name: len(tensor) for name, tensor in samples.items()}, "tokens": tokens})


def read_activations(folder: Path, device: str) -> Activations:
    """One site's group, to be read onto a device; samples become float32. Raises UserError as `open_group` and `read_tensor`."""
    group = open_group(folder)
    bins = len(group.attrs["tokens"])
    places = {"second_moment": ("second_moment", ...), "shift": ("channels", 0)}
    places |= {"absmax": ("channels", slice(1, 1 + bins)), "mean": ("channels", slice(1 + bins, 1 + 2 * bins))}
    start = 0
    for name, rows in group.attrs["rows"].items():
        places[name] = ("samples", slice(start, start := start + rows))
    return Activations(lambda name: read_tensor(group, *places[name]).to(device, torch.float32), bins)


def tokens_per_column(folder: Path) -> float:
    """How many calibration tokens a site's second moments rest on, per channel of its input."""
    group = open_group(folder)
    return sum(group.attrs["tokens"]) / group["channels"].shape[1]


def site_folder(activations: Path, block: int, site: str) -> Path:
    """Where a site's group lies inside `artifacts/activations/<expert>.zarr`."""
    return activations / block_name(block) / site


def block_name(block: int) -> str:
    return f"block_{block:02d}"
