"""Factors one site: selects its input transform (mean, smoothing, rotation) and its low-rank branch; q/k/v jointly."""

from typing import Any

import torch
from torch import Tensor

from stepquant.params import Smooth
from stepquant.quantize.quantized_layer import LayerSpec
from stepquant.quantize.smooth import TransformCandidates, search_transform
from stepquant.quantize.smooth_gradient import refine_smoothing
from stepquant.recipe.settings import FactorSettings, quant_scheme
from stepquant.recipe.site_files import TransformFactors
from stepquant.recipe.site_statistics import SiteStatistics


def factor_site(
    W: Tensor, statistics: SiteStatistics, settings: FactorSettings
) -> tuple[TransformFactors, dict[str, Any]]:
    """Searches smoothing and rotation of a site, refines the smoothing by gradient, and factors the outliers.

    Args:
        W: Stacked weight of the site, [N, K].
        statistics: The site's statistics, on the device of W.
        settings: Sections of params.yaml.

    Returns:
        What is stored (bfloat16, the values that every later part uses), and a record of the candidates and their
        errors in JSON types.

    Raises:
        UserError: As `search_transform`.
    """
    mean = statistics.mean.mean(0) if settings.center.means else torch.zeros_like(statistics.mean[0])
    mean = mean.to(torch.bfloat16)
    rotate = settings.rotate
    candidates = TransformCandidates(smoothing_exponents(settings.smooth), rotate.hadamard_sizes, rotate.hadamard)
    spec = LayerSpec(settings.lowrank.rank, settings.lowrank.seed, quant_scheme(settings.format))
    magnitude, samples = channel_magnitude(statistics, mean, settings.smooth.magnitude), statistics.search
    search = search_transform(W, torch.cat(samples), magnitude, mean, candidates, spec)
    # A sample is in the order of the prompts: the gradient uses one half of them, the decision the other.
    learn, validation = (torch.cat(halves) for halves in zip(*(x.tensor_split(2) for x in samples)))
    search = refine_smoothing(W, learn, validation, search, spec, steps=settings.smooth.gradient_steps)
    transform = search.transform
    record = {
        "alpha": search.alpha,
        "beta": search.beta,
        "candidates": candidates.exponents,
        "search_errors": search.errors,
        "learned": search.learned,
        "rotation": transform.rotation,
        "rotations": candidates.rotations,
        "rotation_errors": search.rotation_errors,
    }
    return TransformFactors(
        transform.mean, transform.smooth, transform.rotation, transform.hadamard, search.proj_down, search.proj_up
    ), record


def smoothing_exponents(settings: Smooth) -> list[tuple[float, float]]:
    """The pairs (alpha, beta) that the search tries."""
    alphas = settings.candidates if settings.alpha == "search" else [settings.alpha]
    return [(alpha, 1 - alpha if settings.beta is None else settings.beta) for alpha in alphas]


def channel_magnitude(statistics: SiteStatistics, mean: Tensor, measure: str) -> Tensor:
    """Magnitude of each input channel over all tokens, [K].

    Args:
        statistics: The site's statistics.
        mean: The mean that is subtracted from the input, [K].
        measure: "rms", the root mean square about the mean, or "absmax", the largest magnitude.
    """
    if measure == "rms":
        return statistics.variance_about(mean).clamp(min=0).sqrt()
    return statistics.absmax.amax(0)
