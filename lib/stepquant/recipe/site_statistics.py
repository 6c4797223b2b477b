"""Statistics of a site's input, per timestep bin: what smoothing, the branch, GPTQ and the clip are computed from.

Of one site (B bins, K channels); nothing of a held-out prompt enters anything but `heldout.*`:

    shift         [K]       about where x lies: the channel means of the first calibration call
    hessian [K, K]    mean over bins of the bin's mean (x - shift)(x - shift)ᵀ (each bin counts the same, however many
                            steps it has); about the shift, because where channels hardly leave their mean, float32
                            would lose what they do in the square of the mean
    absmax        [B, K]    largest |x| per channel
    mean          [B, K]    mean of x per channel
    search.<bin>      [S, K]    a seeded sample of calibration tokens, without replacement
    validation.<bin>  [S, K]    the same from the validation prompts, which nothing else is computed from: choices are made on them
    heldout.<bin>     [S, K]    the same from the held-out prompts

calibration/statistics_files.py keeps them on disk.
"""

from collections.abc import Callable

import torch

SAMPLES = ("search", "validation", "heldout")
FEW_TOKENS = 4  # per column: with fewer, second moments are warned of (docs/calibration.md)


class SiteStatistics:
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
    def hessian(self) -> torch.Tensor:
        return self.load("hessian")

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

    def hessian_about(self, point: torch.Tensor) -> torch.Tensor:
        """Mean of (x - point)(x - point)ᵀ, float32 [K, K], each bin weighing the same; about 0 it is that of x itself."""
        shift = self.shift
        move, average = point.float() - shift, self.mean.mean(0) - shift
        return self.hessian.addr(average - move, move, alpha=-1).addr_(move, average, alpha=-1)

    def variance_about(self, point: torch.Tensor) -> torch.Tensor:
        """The diagonal of `hessian_about`, [K]; rounding may leave it just below zero."""
        shift = self.shift
        move, average = point.float() - shift, self.mean.mean(0) - shift
        return self.hessian.diagonal() - 2 * average * move + move.square()
