"""Weight scales chosen by their error instead of the largest magnitude: free at run time, for weights only.

E8M0 scales jump by powers of two, E2M1 is coarsest between 4 and 6, and int4's largest value is rarely the one that
matters: the group's own squared error decides (Four Over Six, arXiv 2512.02010; MSE grids of MR-GPTQ, arXiv 2509.23202).
"""

import torch
from torch import Tensor

from stepquant.formats import Format, Scales, check_finite

# What a group's absmax is multiplied with. nvfp4: 1.5 puts the largest value at 4 instead of 6. mxfp4: the two exponents
# around the absmax, the larger of which never saturates.
CLIPS = {
    "int4": (1.0, 0.9375, 0.875, 0.8125, 0.75),
    "mxfp4": (1.0, 0.5),
    "nvfp4": (1.5, 1.25, 1.125, 1.0, 0.875, 0.75),
}


def scales_by_error(fmt: Format, W: Tensor) -> Scales:
    """Scales of a weight W [N, K] with the smallest squared rounding error per group; the tensor scale from the absmax.

    Raises UserError if W holds NaN or infinity, or fmt's group does not divide K.
    """
    check_finite(W, "weight")
    W, tensor = W.float(), fmt.tensor_scale(W)
    amax = fmt.amax(W)
    clip = error = None
    for candidate in CLIPS[fmt.name]:
        rounded = fmt.fake_quantize(W, clip=candidate, rounding="ceil", tensor=tensor, amax=amax)
        squared = rounded.sub_(W).square_().unflatten(-1, (-1, fmt.group)).sum(dim=-1)
        if clip is None:
            clip, error = torch.full_like(squared, candidate), squared
        else:
            clip = torch.where(squared < error, candidate, clip)
            error = torch.minimum(squared, error)
    return fmt.scales(W, clip=clip, rounding="ceil", tensor=tensor, amax=amax)
