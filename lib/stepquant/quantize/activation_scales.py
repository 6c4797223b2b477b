"""Rounds activations, with each group's scale from its largest magnitude or from its rounding error.

E2M1 is coarsest between 4 and 6. So a group of nvfp4 can be rounded better with absmax / 4 as its scale than with
absmax / 6. The rule "error" tries both for each group, when the layer runs, and keeps the one with the smaller squared
error; of equal errors that of absmax / 6 (Four Over Six, arXiv 2512.02010, section 3). A clip multiplies both.

The other formats have no such rule: E8M0 scales differ by powers of two, and int4's grid is uniform.
"""

import torch
from torch import Tensor

from stepquant.errors import InvalidInput
from stepquant.formats import Format

SCALE_RULES = ("absmax", "error")
FORMATS_BY_ERROR = ("nvfp4",)
LARGEST_TO_FOUR = 1.5  # times absmax / 6 is absmax / 4


def check_scale_rule(rule: str, activation: str | None, what: str) -> None:
    """Raises InvalidInput, with the name `what`, for an unknown rule or one that the activation format lacks.

    Args:
        rule: One of SCALE_RULES.
        activation: Name of the activation format; None leaves activations unquantized, and the rule without effect.
        what: What the message names.
    """
    if rule not in SCALE_RULES:
        raise InvalidInput(f"{what} is {rule!r}; allowed: {', '.join(SCALE_RULES)}")
    if rule == "error" and activation is not None and activation not in FORMATS_BY_ERROR:
        raise InvalidInput(
            f"{what} is 'error', but activations are {activation}; allowed: 'absmax', or "
            f"{' or '.join(FORMATS_BY_ERROR)} activations"
        )


def fake_quantize_activation(
    z: Tensor, fmt: Format, rule: str, *, clip: float | Tensor, exponent_offset: int | Tensor, rounding: str
) -> Tensor:
    """z rounded to the activation format.

    Args:
        z: Transformed input, float32 [..., K].
        fmt: The activation format.
        rule: How the scale of a group is chosen, one of SCALE_RULES that the format has (`check_scale_rule`).
        clip: Multiplies each group's absmax; a float or a tensor broadcastable to [..., K/g].
        exponent_offset: Added to the E8M0 exponent (mxfp4; 0 for the other formats).
        rounding: How an E8M0 scale is rounded, "floor" or "ceil".

    Returns:
        float32 [..., K].
    """
    amax = fmt.amax(z) * clip
    rounded = fmt.fake_quantize(z, exponent_offset=exponent_offset, rounding=rounding, amax=amax)
    if rule == "absmax":
        return rounded
    other = fmt.fake_quantize(z, clip=LARGEST_TO_FOUR, rounding=rounding, amax=amax)
    z, rounded, other = (torch.unflatten(values, -1, (-1, fmt.group)) for values in (z, rounded, other))
    better = (other - z).square_().sum(-1, keepdim=True) < (rounded - z).square_().sum(-1, keepdim=True)
    return torch.where(better, other, rounded).flatten(-2)
