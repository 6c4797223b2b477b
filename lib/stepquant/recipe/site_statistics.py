"""Statistics of a site's input per timestep bin, from which smoothing, low-rank branch, GPTQ and clip are computed.

Tensors of one site (B bins, K channels). Held-out prompts contribute to `heldout.<bin>` only:

    shift             [K]       the point about which the Hessian is summed: channel means of the first calibration call
    hessian           [K, K]    H = mean over bins of each bin's mean (x - shift)(x - shift)ᵀ; every bin has the same
                                weight, however many steps it has. Centering keeps float32 accurate for channels whose
                                mean is large compared with their spread
    hessian_diagonal  [K]       diagonal of H, stored on its own because H is large
    absmax            [B, K]    largest |x| per channel
    mean              [B, K]    mean of x per channel
    search.<bin>      [S, K]    a seeded sample of calibration tokens, without replacement
    validation.<bin>  [S, K]    the same from the validation prompts, which are used only to choose between candidates
    heldout.<bin>     [S, K]    the same from the held-out prompts

calibration/statistics_files.py stores them.
"""

from collections.abc import Callable

import torch

SAMPLES = ("search", "validation", "heldout")
FEW_TOKENS = 4  # tokens per column below which a stage warns about its Hessian (docs/calibration.md)


def more_tokens(*, text_alone: bool) -> str:
    """What gives the Hessian of a site more tokens. text_alone: whether the site reads the text tokens alone."""
    captions = "list captions in a file and name it in trajectories.text_prompts, or "
    return captions * text_alone + "raise trajectories.calibration_prompts"


class SiteStatistics:
    """One site's statistics; the header lists the tensors and their shapes.

    A tensor is loaded on each access and not cached: at 13,824 channels the Hessian and the samples are 1.2 GB, and no
    stage needs all of it.

    Args:
        load: returns the tensor of a name listed in the header, float32.
        bins: number of timestep bins B of the site.
    """

    def __init__(self, load: Callable[[str], torch.Tensor], bins: int):
        self.load, self.bins = load, bins

    @property
    def shift(self) -> torch.Tensor:
        """[K]."""
        return self.load("shift")

    @property
    def hessian(self) -> torch.Tensor:
        """[K, K], about `shift`."""
        return self.load("hessian")

    @property
    def absmax(self) -> torch.Tensor:
        """[B, K]."""
        return self.load("absmax")

    @property
    def mean(self) -> torch.Tensor:
        """[B, K]."""
        return self.load("mean")

    @property
    def search(self) -> list[torch.Tensor]:
        """Calibration samples [S, K], one tensor per bin."""
        return self._samples("search")

    @property
    def validation(self) -> list[torch.Tensor]:
        """Validation samples [S, K], one tensor per bin."""
        return self._samples("validation")

    @property
    def heldout(self) -> list[torch.Tensor]:
        """Held-out samples [S, K], one tensor per bin."""
        return self._samples("heldout")

    def hessian_about(self, point: torch.Tensor) -> torch.Tensor:
        """The Hessian about another point than `shift`.

        Args:
            point: [K]; zeros give the Hessian of x itself.

        Returns:
            Mean over bins of each bin's mean (x - point)(x - point)ᵀ, float32 [K, K].
        """
        move, average = self._move(point)
        return self.hessian.addr(average - move, move, alpha=-1).addr_(move, average, alpha=-1)

    def variance_about(self, point: torch.Tensor) -> torch.Tensor:
        """The diagonal of `hessian_about`, without loading the Hessian.

        Args:
            point: [K].

        Returns:
            float32 [K]; rounding can make a value slightly negative.
        """
        move, average = self._move(point)
        return self.load("hessian_diagonal") - 2 * average * move + move.square()

    def _move(self, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The point and the mean over bins, both relative to the shift."""
        shift = self.shift
        return point.float() - shift, self.mean.mean(0) - shift

    def _samples(self, kind: str) -> list[torch.Tensor]:
        return [self.load(f"{kind}.{b}") for b in range(self.bins)]
