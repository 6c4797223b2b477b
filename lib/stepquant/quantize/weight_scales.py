"""Weight scales selected by their rounding error instead of the largest magnitude: no cost at run time, weights only.

E8M0 scales differ by powers of two, E2M1 is coarsest between 4 and 6, and int4's largest value is rarely the one that
matters. So each group selects the scale with its smallest squared error (Four Over Six, arXiv 2512.02010; MSE grids of
MR-GPTQ, arXiv 2509.23202).
"""

import torch
from torch import Tensor

from stepquant.formats import Format, Scales, check_finite

# Factors of a group's absmax. nvfp4: 1.5 maps the largest value to 4 instead of 6. mxfp4: the two exponents around
# the absmax, the larger of which never saturates.
CLIPS = {
    "int4": (1.0, 0.9375, 0.875, 0.8125, 0.75),
    "mxfp4": (1.0, 0.5),
    "nvfp4": (1.5, 1.25, 1.125, 1.0, 0.875, 0.75),
    "asym_w4a8": (1.0625, 1.0, 0.9375, 0.875, 0.8125, 0.75),
}


def scales_by_error(fmt: Format, W: Tensor) -> Scales:
    """Scales of a weight with the smallest squared rounding error per group; the tensor scale comes from the absmax.

    Args:
        fmt: Format of the weight.
        W: [N, K] of any float dtype.

    Raises:
        UserError: W holds NaN or infinity, or the group size does not divide K.
    """
    check_finite(W, "weight")
    W, tensor = W.float(), fmt.tensor_scale(W)
    amax = fmt.amax(W)
    first, *others = CLIPS[fmt.name]
    clip, error = torch.full_like(amax, first), _group_errors(fmt, W, first, tensor, amax)
    for candidate in others:
        squared = _group_errors(fmt, W, candidate, tensor, amax)
        clip = torch.where(squared < error, candidate, clip)
        error = torch.minimum(squared, error)
    return fmt.scales(W, clip=clip, rounding="ceil", tensor=tensor, amax=amax)


def _group_errors(fmt: Format, W: Tensor, clip: float, tensor: Tensor | None, amax: Tensor) -> Tensor:
    """Squared rounding error of each group [N, K/g] under one clip."""
    rounded = fmt.fake_quantize(W, clip=clip, rounding="ceil", tensor=tensor, amax=amax)
    return torch.unflatten(rounded.sub_(W).square_(), -1, (-1, fmt.group)).sum(dim=-1)
