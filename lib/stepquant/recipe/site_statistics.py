"""Statistics of a site's input: what smoothing, the branch, GPTQ and the clip are computed from.

Of one site with B timestep bins and K channels, from the calibration prompts unless stated otherwise:

    shift             [K]       the channel means of the first call; the Hessian is taken about this point, because
                                channels that hardly leave their mean would lose precision in float32 squares
    hessian           [K, K]    Hessian (second moments): mean over bins of the bin's mean (x - shift)(x - shift)^T;
                                each bin has the same weight, however many sampler steps it contains
    absmax            [B, K]    largest |x| per channel
    mean              [B, K]    mean of x per channel
    search.<bin>      [S, K]    a seeded sample of tokens, without replacement
    validation.<bin>  [S, K]    the same from the validation prompts, on which choices are made
    heldout.<bin>     [S, K]    the same from the held-out prompts, on which errors are reported

No other tensor is computed from validation or held-out prompts. calibration/statistics_files.py stores the statistics.
"""

from collections.abc import Callable

import torch

SAMPLES = ("search", "validation", "heldout")
FEW_TOKENS = 4  # per column: with fewer, stage gptq warns about its Hessian (docs/calibration.md)


class SiteStatistics:
    """One site's statistics; shapes in the header of this file.

    A tensor is loaded on each access and not kept: at 13,824 channels Hessian and samples take 1.4 GB, and no stage
    needs all of them.
    """

    def __init__(self, load: Callable[[str], torch.Tensor], bins: int):
        """Statistics that are loaded on demand.

        Args:
            load: Gives a tensor, float32, by the name it has in the header.
            bins: Number of timestep bins; 1 for a site that does not depend on t.
        """
        self.load, self.bins = load, bins

    @property
    def shift(self) -> torch.Tensor:
        """[K], the point about which `hessian` is taken."""
        return self.load("shift")

    @property
    def hessian(self) -> torch.Tensor:
        """[K, K], about `shift`."""
        return self.load("hessian")

    @property
    def absmax(self) -> torch.Tensor:
        """[bins, K]."""
        return self.load("absmax")

    @property
    def mean(self) -> torch.Tensor:
        """[bins, K]."""
        return self.load("mean")

    @property
    def search(self) -> list[torch.Tensor]:
        """Search tokens [S, K] of each bin."""
        return [self.load(f"search.{b}") for b in range(self.bins)]

    @property
    def validation(self) -> list[torch.Tensor]:
        """Validation tokens [S, K] of each bin."""
        return [self.load(f"validation.{b}") for b in range(self.bins)]

    @property
    def heldout(self) -> list[torch.Tensor]:
        """Held-out tokens [S, K] of each bin."""
        return [self.load(f"heldout.{b}") for b in range(self.bins)]

    def hessian_about(self, point: torch.Tensor) -> torch.Tensor:
        """Mean of (x - point)(x - point)^T with the same weight for each bin, float32 [K, K]; point is [K]."""
        shift = self.shift
        move, average = point.float() - shift, self.mean.mean(0) - shift
        return self.hessian.addr(average - move, move, alpha=-1).addr_(move, average, alpha=-1)

    def variance_about(self, point: torch.Tensor) -> torch.Tensor:
        """The diagonal of `hessian_about`, [K]; rounding may leave it just below zero."""
        shift = self.shift
        move, average = point.float() - shift, self.mean.mean(0) - shift
        return self.hessian.diagonal() - 2 * average * move + move.square()
