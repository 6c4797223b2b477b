"""Clipping search: the factor of the dynamic activation scale, per site and timestep bin (arXiv 2605.27003).

Everything else of the layer is final, only the activation quantizer varies. Errors are output errors against the
unquantized layer, so a clip may also compensate a part of the weights' rounding error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from stepquant.errors import UserError
from stepquant.formats import Format
from stepquant.quantize.quantized_layer import (
    QuantizedLayer,
    dequantized_weight,
    fake_quantize_input,
    low_rank_path,
    relative_error,
)


@dataclass(frozen=True)
class ClipCandidate:
    """A clip of the activations.

    Attributes:
        ratio: Multiplies each group's absmax.
        exponent_offset: Added to each group's E8M0 exponent.
    """

    ratio: float
    exponent_offset: int


UNCLIPPED = ClipCandidate(1.0, 0)


@dataclass(frozen=True)
class ClipChoice:
    """Positions in the list of candidates.

    Attributes:
        per_bin: The best candidate of each bin.
        single: The best candidate for all bins together.
    """

    per_bin: tuple[int, ...]
    single: int


def clip_candidates(
    ratios: Sequence[float], exponent_offsets: Sequence[int], activation: Format
) -> list[ClipCandidate]:
    """All pairs of ratio and offset, in the order given; a format without exponents to offset has the ratios alone."""
    offsets = exponent_offsets if activation.has_exponent_scale else (0,)
    return [ClipCandidate(ratio, offset) for ratio, offset in product(ratios, offsets)]


def clip_errors(
    bins: Sequence[Tensor], W: Tensor, layer: QuantizedLayer, candidates: Sequence[ClipCandidate]
) -> Tensor:
    """Relative output error of each candidate on each bin's tokens.

    Args:
        bins: Raw inputs [T, K] of each timestep bin.
        W: Weight [N, K] of the unquantized layer, whose output without bias is the reference.
        layer: The quantized layer.
        candidates: The clips to compare.

    Returns:
        float32 [bins, candidates].
    """
    Q = dequantized_weight(layer)
    return torch.stack([_errors_of_bin(x, W, Q, layer, candidates) for x in bins])


def _errors_of_bin(
    x: Tensor, W: Tensor, Q: Tensor, layer: QuantizedLayer, candidates: Sequence[ClipCandidate]
) -> Tensor:
    reference = x @ W.T
    z, low_rank = layer.transform.apply(x), low_rank_path(x, layer)  # the same for every candidate
    rounded = (fake_quantize_input(z, layer.scheme, c.ratio, c.exponent_offset) for c in candidates)
    return torch.stack([relative_error(torch.addmm(low_rank, r, Q.T), reference) for r in rounded])


def choose_clip(errors: Tensor) -> ClipChoice:
    """The candidates with the smallest error, per bin and over all bins.

    Over all bins the mean square counts, with the same weight for each bin however large its outputs are. Of equal
    candidates the first is chosen. A candidate without a finite error is never chosen.

    Args:
        errors: Relative errors [bins, candidates].

    Raises:
        UserError: A bin has no candidate with a finite error, or no candidate is finite in every bin.
    """
    # argmin would take a NaN for the smallest value. One copy to the host, since every line below reads it.
    errors = torch.where(errors.isfinite(), errors, torch.inf).cpu()
    over_bins = errors.square().mean(dim=0)
    for b, smallest in enumerate(errors.amin(dim=1).tolist()):
        if smallest == torch.inf:
            raise UserError(_nothing_finite(f"timestep bin {b}", errors.shape[1]))
    if over_bins.amin().item() == torch.inf:
        raise UserError(_nothing_finite("all timestep bins together", errors.shape[1]))
    return ClipChoice(tuple(errors.argmin(dim=1).tolist()), int(over_bins.argmin()))


def _nothing_finite(where: str, candidates: int) -> str:
    return (
        f"clipping search: none of {candidates} candidates has a finite output error in {where}, so the site's "
        "captured inputs or its quantized weight hold NaN or infinity, or its output is zero; check the source "
        "model's weights, and run stage capture and the stages after it again"
    )
