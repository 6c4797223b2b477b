"""Clip search: what the dynamic activation scale is multiplied with, per site and timestep bin (arXiv 2605.27003).

Everything else of the layer is final, only the activation quantizer varies; errors are output errors against the
unquantized layer, so that a clip may also make up for what the weights lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

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
    """ratio multiplies each group's absmax, exponent_offset is added to its E8M0 exponent."""

    ratio: float
    exponent_offset: int


UNCLIPPED = ClipCandidate(1.0, 0)


@dataclass(frozen=True)
class ClipChoice:
    """Positions in the list of candidates: the best one of each bin, and the best one for all bins together."""

    per_bin: tuple[int, ...]
    single: int


def clip_candidates(
    ratios: Sequence[float], exponent_offsets: Sequence[int], activation: Format
) -> list[ClipCandidate]:
    """All pairs, in the order given; only mxfp4 has an exponent to offset, the other formats get the ratios alone."""
    offsets = exponent_offsets if activation.name == "mxfp4" else (0,)
    return [ClipCandidate(ratio, offset) for ratio, offset in product(ratios, offsets)]


def clip_errors(
    bins: Sequence[Tensor], W: Tensor, factors: QuantizedLayer, candidates: Sequence[ClipCandidate]
) -> Tensor:
    """Relative output error of each candidate on each bin's tokens, float32 [bins, C].

    bins: raw inputs x [T, K] of each bin; W [N, K] is the weight of the unquantized layer, whose output (without bias) is the
    reference.
    """
    Q = dequantized_weight(factors)
    return torch.stack([_errors_of_bin(x, W, Q, factors, candidates) for x in bins])


def _errors_of_bin(
    x: Tensor, W: Tensor, Q: Tensor, factors: QuantizedLayer, candidates: Sequence[ClipCandidate]
) -> Tensor:
    reference = x @ W.T
    z, exact = factors.transform.apply(x), low_rank_path(x, factors)  # the same for every candidate
    seen = (
        fake_quantize_input(z, factors.scheme, candidate.ratio, candidate.exponent_offset) for candidate in candidates
    )
    return torch.stack([relative_error(torch.addmm(exact, rounded, Q.T), reference) for rounded in seen])


def choose_clip(errors: Tensor) -> ClipChoice:
    """The candidate with the smallest error, per bin and over all bins, from relative errors [bins, C].

    Over all bins it is the mean square that counts, each bin alike however large its outputs are. Of equal candidates the
    first wins.
    """
    return ClipChoice(tuple(errors.argmin(dim=1).tolist()), int(errors.square().mean(dim=0).argmin()))
