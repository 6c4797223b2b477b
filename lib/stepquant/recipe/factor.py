"""Factor one site: choose its input transform (mean, smoothing, rotation) and its low-rank branch; q/k/v jointly."""

from typing import Any

import torch
from torch import Tensor

from stepquant.params import Smooth
from stepquant.quantize.smooth import search_transform
from stepquant.quantize.smooth_gradient import refine_smoothing
from stepquant.recipe.settings import FactorSettings, quant_scheme
from stepquant.recipe.site_files import TransformFactors
from stepquant.recipe.site_statistics import SiteStatistics


def factor_site(
    W: Tensor, statistics: SiteStatistics, settings: FactorSettings
) -> tuple[TransformFactors, dict[str, Any]]:
    """Search smoothing and rotation of a site with the weight W [N, K], refine the smoothing by gradient, factor the outliers.

    Returns what is stored (bfloat16, as used from here on), and a record of the candidates and their errors, in JSON types.
    """
    mean = statistics.mean.mean(0) if settings.center.means else torch.zeros_like(statistics.mean[0])
    mean = mean.to(torch.bfloat16)
    exponents, rotations = smoothing_exponents(settings.smooth), settings.rotate.hadamard_sizes
    magnitude, samples = channel_magnitude(statistics, mean, settings.smooth.magnitude), statistics.search
    rank, seed, scheme = settings.lowrank.rank, settings.lowrank.seed, quant_scheme(settings.format)
    search = search_transform(
        W, torch.cat(samples), magnitude, mean, exponents, rotations, rank=rank, seed=seed, scheme=scheme
    )
    # A sample is in the order of the prompts: one half of them to learn from, the other to decide by.
    learn, validation = (torch.cat(halves) for halves in zip(*(x.tensor_split(2) for x in samples)))
    search = refine_smoothing(
        W, learn, validation, search, steps=settings.smooth.gradient_steps, rank=rank, seed=seed, scheme=scheme
    )
    transform = search.transform
    record = {
        "alpha": search.alpha,
        "beta": search.beta,
        "candidates": exponents,
        "search_errors": search.errors,
        "learned": search.learned,
        "rotation": transform.rotation,
        "rotations": rotations,
        "rotation_errors": search.rotation_errors,
    }
    return TransformFactors(
        transform.mean, transform.smooth, transform.rotation, search.proj_down, search.proj_up
    ), record


def smoothing_exponents(settings: Smooth) -> list[tuple[float, float]]:
    """The pairs (alpha, beta) that the search tries."""
    alphas = settings.candidates if settings.alpha == "search" else [settings.alpha]
    return [(alpha, 1 - alpha if settings.beta is None else settings.beta) for alpha in alphas]


def channel_magnitude(statistics: SiteStatistics, mean: Tensor, measure: str) -> Tensor:
    """How large each input channel is over all tokens, [K]: root mean square about the mean ("rms"), or largest ("absmax")."""
    if measure == "rms":
        return statistics.variance_about(mean).clamp(min=0).sqrt()
    return statistics.absmax.amax(0)
