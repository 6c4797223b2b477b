"""Centring: the main path quantizes x - m, where m holds the channel means of x in the current timestep bin.

    x @ W.T = main(x - m) + branch(x) + b,      b = m @ (W - proj_up @ proj_down.T).T

AdaLN moves the channel means with t, and a mean that is common to all tokens costs range without carrying information. It
costs one vector [K] and one bias [N] per bin; the part of the output that belongs to the mean is exact. On one block of the
demo model it takes 15 % off the W4A4 error, most of it at `attn2.out` (half and more), and one mean for all bins does as
well as one per bin; on layers whose means move from bin to bin by their spread, 10 % with one mean and 20 % with one per bin.
"""

from torch import Tensor

from stepquant.quantize.layer import LayerFactors, branch_path, main_path


def centred_moments(H: Tensor, means: Tensor) -> Tensor:
    """Mean second moments [K, K] of x - m, from those of x (each bin weighing the same) and the means [bins, K] of x."""
    return H - means.T @ means / len(means)


def centre_bias(W: Tensor, means: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
    """What is added to the output of a centred layer, float32 [bins, N], for the means [bins, K] that were subtracted."""
    means = means.float()
    return means @ W.float().T - (means @ proj_down.float()) @ proj_up.float().T


def centred_output(
    x: Tensor,
    mean: Tensor,
    bias: Tensor,
    factors: LayerFactors,
    clip: float | Tensor,
    exponent_offset: int | Tensor,
) -> Tensor:
    """Output of the quantized layer, float32 [T, N], for tokens x [T, K] of one bin with its mean [K] and bias [N]."""
    return main_path(x.float() - mean, factors, clip, exponent_offset) + branch_path(x, factors) + bias
