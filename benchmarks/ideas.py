"""Ideas that are not part of the default recipe; docs/experiments/recipe-ablations.md says what each is worth.

    python benchmarks/layer_error.py --recipes default IDEA ...

Each idea is a recipe: the default with one change, by the recipe's own functions where these can express it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.layers import Layer
from benchmarks.recipes import RANK, Quantized, Recipe, Settings, changed, clipped, pipeline
from stepquant.quantize.clip import ClipCandidate, choose_clip, clip_errors
from stepquant.quantize.gptq import gptq, inverse_factor
from stepquant.quantize.quantized_layer import QuantizedLayer, fake_quantize_input, layer_output
from stepquant.recipe.factor import factor_site
from stepquant.recipe.round import alternate, choose_scales, damped_problem, round_site
from stepquant.recipe.site_statistics import SiteStatistics

GPTAQ_DAMPING = 0.001


@dataclass(frozen=True)
class PerBin:
    """A layer of which more than the clip depends on the timestep bin."""

    bins: list[Quantized]

    def outputs(self, x: Tensor, W: Tensor, b: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.bins[b].outputs(x, W, 0)


def _per_bin(quantized: Quantized, factors: Callable[[int], QuantizedLayer], bins: int) -> PerBin:
    return PerBin([Quantized(factors(b), [quantized.clips[b % len(quantized.clips)]]) for b in range(bins)])


def _changed(activations: SiteStatistics, change: Callable[[str, Tensor], Tensor]) -> SiteStatistics:
    """The same statistics with each tensor changed according to its name."""
    return SiteStatistics(lambda name: change(name, activations.load(name)), activations.bins)


# --- smoothing ---


def absmax_mean_of_bins(layer: Layer, fmt: str) -> Quantized:
    """Smoothing by each channel's absmax, averaged over bins instead of the maximum over bins."""

    def averaged() -> SiteStatistics:
        return _changed(layer.activations(), lambda name, t: t.mean(0, keepdim=True) if name == "absmax" else t)

    return pipeline(replace(layer, activations=averaged), fmt, smooth={"magnitude": "absmax"})


# --- means ---


def mean_per_bin(layer: Layer, fmt: str) -> PerBin:
    """A mean and a bias per bin; codes, branch and clip of the default."""
    quantized, means = pipeline(layer, fmt), layer.activations().mean.to(torch.bfloat16)

    def factors(b: int) -> QuantizedLayer:
        transform = replace(quantized.factors.transform, mean=means[b])
        offset = transform.offset(layer.W, quantized.factors.proj_down, quantized.factors.proj_up)
        return replace(quantized.factors, transform=transform, offset=offset)

    return _per_bin(quantized, factors, len(means))


def mean_correction(layer: Layer, fmt: str) -> PerBin:
    """A bias per bin that subtracts the mean output error of the bin's search tokens."""
    quantized, search = pipeline(layer, fmt), layer.activations().search

    def factors(b: int) -> QuantizedLayer:
        clip = quantized.clips[b % len(quantized.clips)]
        error = layer_output(search[b], quantized.factors, clip.ratio, clip.exponent_offset) - search[b] @ layer.W.T
        return replace(quantized.factors, offset=quantized.factors.offset - error.mean(0))

    return _per_bin(quantized, factors, len(search))


# --- activations ---


def activation_scales_by_error(layer: Layer, fmt: str) -> Quantized:
    """format.activation_scales: error, which nvfp4 alone has; the default of the other formats."""
    return pipeline(layer, fmt, format={"activation_scales": "error" if fmt == "nvfp4" else "absmax"})


# --- branch and rounding ---


def noise_but_its_branch(layer: Layer, fmt: str) -> Quantized:
    """Noise-aware codes that start from the branch of the transform search instead of the noise-aware branch."""
    settings, statistics = Settings.of(fmt), layer.activations()
    factors = factor_site(layer.W, statistics, settings.factor)[0]
    problem = damped_problem(layer.W, statistics, factors, settings.round)[0]
    return clipped(layer, settings, alternate(problem, factors.branch, settings.round))


def gptaq(layer: Layer, fmt: str) -> Quantized:
    """A last GPTQ with measured Hessians of rounded and unrounded calibration tokens (GPTAQ, arXiv 2504.02692).

    The calibration tokens of real sites are not stored, so the search tokens are used instead.
    """
    settings, statistics = Settings.of(fmt), layer.activations()
    factors = factor_site(layer.W, statistics, settings.factor)[0]
    final = round_site(layer.W, statistics, factors, settings.round)[0].layer(factors.transform, settings.scheme)
    tokens = torch.cat(statistics.search) if layer.calibration is None else layer.calibration
    z = final.transform.apply(tokens)
    rounded = fake_quantize_input(z, final.scheme, 1.0, 0)
    H, cross = rounded.T @ rounded / len(rounded), rounded.T @ z / len(rounded)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    target = torch.linalg.solve(damped, cross @ final.transform.residual(layer.W, final.proj_down, final.proj_up).T).T
    return _with_codes(layer, settings, final, target, H)


def _with_codes(layer: Layer, settings: Settings, final: QuantizedLayer, target: Tensor, H: Tensor) -> Quantized:
    """The layer with GPTQ's codes of `target` [N, K] under the Hessian H, and the branch and clips of `final`."""
    factor = inverse_factor(H, damping=GPTAQ_DAMPING, act_order=settings.round.gptq.act_order)
    scales = choose_scales(settings.round.gptq.scales, final.scheme, target)
    factors = replace(final, codes=gptq(target, factor, scales, final.scheme.weight), scales=scales)
    return Quantized(factors, clipped(layer, settings, final).clips)


def sorted_channels(layer: Layer, fmt: str) -> Quantized:
    """Channels sorted by magnitude after smoothing, even where the model forbids it: an upper bound."""
    activations, s = (
        layer.activations(),
        factor_site(layer.W, layer.activations(), Settings.of(fmt).factor)[0].smooth.float(),
    )
    order = (activations.variance_about(activations.mean.mean(0)).clamp(min=0).sqrt() / s).argsort()
    quantized = pipeline(_permuted(layer, order), fmt)
    return _Permuted(quantized, order)


@dataclass(frozen=True)
class _Permuted:
    """A layer whose input channels are in another order."""

    quantized: Quantized
    order: Tensor

    def outputs(self, x: Tensor, W: Tensor, b: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.quantized.outputs(x[:, self.order], W[:, self.order], b)


def _permuted(layer: Layer, order: Tensor) -> Layer:
    def activations() -> SiteStatistics:
        return _changed(layer.activations(), lambda name, t: t[order][:, order] if name == "hessian" else t[..., order])

    calibration = None if layer.calibration is None else layer.calibration[:, order]
    return replace(layer, W=layer.W[:, order], activations=activations, calibration=calibration)


# --- clip ---


def continuous_clip(layer: Layer, fmt: str) -> Quantized:
    """The clipping ratio refined around the best of the grid, to 1/160 in three halvings of the distance."""
    quantized = pipeline(layer, fmt)
    search = layer.activations().search
    clips = [
        _refined(x, layer.W, quantized.factors, quantized.clips[b % len(quantized.clips)]) for b, x in enumerate(search)
    ]
    return Quantized(quantized.factors, clips)


def _refined(x: Tensor, W: Tensor, factors: QuantizedLayer, clip: ClipCandidate) -> ClipCandidate:
    for distance in (0.025, 0.0125, 0.00625):
        tried = [replace(clip, ratio=clip.ratio + move) for move in (0.0, -distance, distance)]
        clip = tried[choose_clip(clip_errors([x], W, factors, tried)).single]
    return clip


IDEAS: dict[str, Recipe] = {
    "absmax_mean_of_bins": absmax_mean_of_bins,
    "beta_0.1": changed(smooth={"alpha": 0.7, "beta": 0.1}),
    "beta_0.5": changed(smooth={"alpha": 0.7, "beta": 0.5}),
    "alpha_to_0.9": changed(smooth={"candidates": [0.5, 0.6, 0.7, 0.8, 0.9]}),
    "gradient_120": changed(smooth={"gradient_steps": 120}),
    "rotation_16": changed(rotate={"hadamard_sizes": [0, 16]}),
    "mean_per_bin": mean_per_bin,
    "mean_correction": mean_correction,
    "activation_scales_by_error": activation_scales_by_error,
    "noise_0.5": changed(gptq={"noise": 0.5}),
    "noise_1": changed(gptq={"noise": 1.0}),
    "noise_but_its_branch": noise_but_its_branch,
    "gptaq": gptaq,
    "refits_8": changed(gptq={"refits": 8}),
    "damping_0.0003": changed(gptq={"dampings": [0.0003]}),
    "damping_0.003": changed(gptq={"dampings": [0.003]}),
    "damping_0.03": changed(gptq={"dampings": [0.03]}),
    "damping_to_the_third": changed(gptq={"dampings": [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]}),
    "sorted_channels": sorted_channels,
    "coarse_clip": changed(clip={"ratios": [0.6, 0.7, 0.8, 0.9, 1.0]}),
    "continuous_clip": continuous_clip,
    # What the default recipe of asym_w4a8 leaves out, because ComfyUI's files cannot carry it.
    "with_means": changed(center={"means": True}),
    "with_branch": changed(lowrank={"rank": RANK}, gptq={"refits": 3}),
}
