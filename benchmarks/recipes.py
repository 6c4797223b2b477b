"""Recipes: from a layer and a format to a quantized layer. Ours call the same functions as the pipeline's stages.

The recipes of others are implemented from their descriptions on this project's numerics, so that a difference in error
is one of the method. Like ours they use the randomized SVD, which makes them several times faster than their own code.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stepquant.profiles
from benchmarks.layers import Layer
from stepquant.formats import get_format, weight_scales
from stepquant.params import section
from stepquant.quantize.alternate import make_problem, rounded_by_gptq
from stepquant.quantize.clip import UNCLIPPED, ClipCandidate, choose_clip, clip_candidates, clip_errors
from stepquant.quantize.lowrank import low_rank_factors, stored_branch
from stepquant.quantize.quantized_layer import (
    LayerSpec,
    QuantizedLayer,
    QuantScheme,
    fake_quantize_input,
    layer_output,
    low_rank_path,
    relative_error,
)
from stepquant.quantize.smooth import (
    TransformCandidates,
    nearest_factors,
    round_to_nearest,
    search_transform,
    smoothing_factor,
)
from stepquant.quantize.transform import InputTransform
from stepquant.recipe.clip import clip_site
from stepquant.recipe.factor import factor_site
from stepquant.recipe.round import round_site
from stepquant.recipe.settings import ClipSettings, FactorSettings, RoundSettings, quant_scheme
from stepquant.recipe.site_statistics import SiteStatistics

PROFILES = Path(stepquant.profiles.__file__).parent
SECTIONS = ("format", "smooth", "center", "rotate", "lowrank", "gptq", "clip")
RANK = 32
REFINEMENTS = 10


@dataclass(frozen=True)
class Quantized:
    """A quantized layer: its factors, and the clip of the activations in each bin (a single one serves all bins)."""

    factors: QuantizedLayer
    clips: list[ClipCandidate] = field(default_factory=lambda: [UNCLIPPED])

    def outputs(self, x: Tensor, W: Tensor, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs [T, N] for tokens x [T, K] of bin b: with weights, with both, with activations alone quantized."""
        clip, factors, scheme = self.clips[b % len(self.clips)], self.factors, self.factors.scheme
        weights_only = replace(factors, scheme=replace(scheme, activation=None))
        rounded = fake_quantize_input(factors.transform.apply(x), scheme, clip.ratio, clip.exponent_offset)
        perfect = factors.transform.residual(W, factors.proj_down, factors.proj_up)
        return (
            layer_output(x, weights_only, 1.0, 0),
            layer_output(x, factors, clip.ratio, clip.exponent_offset),
            rounded @ perfect.T + low_rank_path(x, factors),
        )


Recipe = Callable[[Layer, str], Quantized]


# --- ours: the three parts of the recipe on one layer ---


@dataclass(frozen=True)
class Settings:
    """The settings of the recipe in a format, with some keys changed: those of the demo profile, or of ComfyUI's."""

    factor: FactorSettings
    round: RoundSettings
    clip: ClipSettings

    @classmethod
    def of(cls, fmt: str, **changes: dict[str, Any]) -> "Settings":
        profile = "comfyui_w4a8" if fmt == "asym_w4a8" else "demo"
        params = {name: section(PROFILES / f"{profile}.yaml", name) for name in SECTIONS}
        formats = {"weight": fmt, "activation": activation_of(fmt)}
        changes = changes | {"format": formats | changes.get("format", {})}
        for name, keys in changes.items():
            params[name] = params[name].model_copy(update=keys)
        return cls(
            *(
                kind(**{f.name: params[f.name] for f in fields(kind)})
                for kind in (FactorSettings, RoundSettings, ClipSettings)
            )
        )

    @property
    def scheme(self) -> QuantScheme:
        return quant_scheme(self.factor.format)


def pipeline(layer: Layer, fmt: str, **changes: dict[str, Any]) -> Quantized:
    """The recipe in a format, as `Settings.of`, with keys of params sections changed."""
    settings, statistics = Settings.of(fmt, **changes), layer.activations()
    factors = factor_site(layer.W, statistics, settings.factor)[0]
    residual = round_site(layer.W, statistics, factors, settings.round)[0]
    return clipped(layer, settings, residual.layer(factors.transform, settings.scheme))


def clipped(layer: Layer, settings: Settings, quantized: QuantizedLayer) -> Quantized:
    """The finished layer with the clips that its search selected."""
    table = clip_site(layer.W, quantized, layer.activations(), settings.clip)[0]
    return Quantized(
        quantized,
        [ClipCandidate(ratio, offset) for ratio, offset in zip(table.ratio.tolist(), table.exponent.tolist())],
    )


def changed(**changes: dict[str, Any]) -> Recipe:
    return partial(pipeline, **changes)


# --- others' ---


def rtn(layer: Layer, fmt: str) -> Quantized:
    """Rounding to nearest alone."""
    ones = InputTransform.smoothing(torch.ones(layer.W.shape[1], dtype=torch.bfloat16))
    return Quantized(nearest_factors(layer.W, ones, LayerSpec(0, 0, _scheme(fmt))))


def svdquant(layer: Layer, fmt: str) -> Quantized:
    """arXiv 2411.05007 in short: smoothing by absmax with a searched alpha, branch, rounding to nearest."""
    exponents = [(alpha, 1 - alpha) for alpha in (0.3, 0.4, 0.5, 0.6, 0.7)]
    return Quantized(_smoothed_by_search(layer, layer.activations(), exponents, _scheme(fmt)))


def paper(layer: Layer, fmt: str) -> Quantized:
    """arXiv 2605.27003: rank 16, alpha 0.5, scales by floor, GPTQ without act-order on quantized inputs, clip grid."""
    activations, scheme = layer.activations(), replace(_scheme(fmt), weight_rounding="floor")
    smooth = smoothing_factor(activations.absmax.amax(0), layer.W.abs().amax(0), alpha=0.5, beta=0.5)
    factors = nearest_factors(layer.W, InputTransform.smoothing(smooth), LayerSpec(16, 0, scheme))
    factors = _rounded_by_gptq(layer, activations, factors, act_order=False)
    candidates = clip_candidates([0.6, 0.7, 0.8, 0.9, 1.0], [-1, 0, 1], scheme.activation_format)
    errors = clip_errors(activations.search, layer.W, factors, candidates)
    return Quantized(factors, [candidates[i] for i in choose_clip(errors).per_bin])


def deepcompressor(layer: Layer, fmt: str) -> Quantized:
    """The full recipe of SVDQuant's checkpoints.

    A grid of 39 (alpha, beta) on the output error, ten refinements of the branch against rounding to nearest, of which
    the best by output error is kept, then GPTQ with act-order; all scales from absmax.
    """
    activations, alphas = layer.activations(), [i / 20 for i in range(1, 21)]
    exponents = [(alpha, 1 - alpha) for alpha in alphas] + [(alpha, 0.0) for alpha in alphas[:-1]]
    factors = _smoothed_by_search(layer, activations, exponents, _scheme(fmt))
    factors = _refined_to_nearest(layer.W, torch.cat(activations.search), factors)
    return Quantized(_rounded_by_gptq(layer, activations, factors, act_order=True))


def _scheme(fmt: str) -> QuantScheme:
    return QuantScheme(get_format(fmt), "ceil", get_format(activation_of(fmt)), "ceil", "absmax")


def activation_of(fmt: str) -> str:
    """The format of the activations that belongs to one of weights."""
    return "int8_row" if fmt == "asym_w4a8" else fmt


def _smoothed_by_search(
    layer: Layer, activations: SiteStatistics, exponents: list[tuple[float, float]], scheme: QuantScheme
) -> QuantizedLayer:
    """Smoothing by absmax with the best of some exponents, a branch, and rounding to nearest."""
    magnitude = activations.absmax.amax(0)
    no_mean = torch.zeros(len(magnitude), dtype=torch.bfloat16)
    x, candidates = torch.cat(activations.search), TransformCandidates(exponents, [0])
    found = search_transform(layer.W, x, magnitude, no_mean, candidates, LayerSpec(RANK, 0, scheme))
    return round_to_nearest(layer.W, found.transform, found.proj_down, found.proj_up, scheme)


def _refined_to_nearest(W: Tensor, x: Tensor, factors: QuantizedLayer) -> QuantizedLayer:
    """Alternates branch = SVD(W*s - Q) and Q = nearest(W*s - branch); keeps the smallest output error on x [T, K]."""
    reference, smooth, rank = x @ W.T, factors.transform.smooth, factors.proj_down.shape[1]
    tried = [factors]
    for _ in range(REFINEMENTS):
        rounded = factors.scheme.weight.decode(tried[-1].codes, tried[-1].scales)
        branch = stored_branch(*low_rank_factors(W * smooth.float() - rounded, rank, seed=0), smooth)
        tried.append(round_to_nearest(W, factors.transform, *branch, factors.scheme))
    return min(tried, key=lambda f: relative_error(layer_output(x, f, 1.0, 0), reference).item())


def _rounded_by_gptq(
    layer: Layer, activations: SiteStatistics, factors: QuantizedLayer, *, act_order: bool
) -> QuantizedLayer:
    """The same layer with its residual rounded by GPTQ for quantized inputs, scales from absmax.

    For real sites only the Hessian of unquantized inputs is stored, so it is used instead.
    """
    transform, scheme = factors.transform, factors.scheme
    if layer.calibration is None:
        H = transform.hessian(activations.hessian_about(transform.mean))
    else:
        rounded = fake_quantize_input(transform.apply(layer.calibration), scheme, 1.0, 0)
        H = rounded.T @ rounded / len(rounded)
    problem = make_problem(layer.W, transform, H, None, damping=0.01, act_order=act_order)
    choose_scales = partial(weight_scales, scheme.weight, rounding=scheme.weight_rounding)
    return rounded_by_gptq(problem, (factors.proj_down, factors.proj_up), scheme, choose_scales)


RECIPES: dict[str, Recipe] = {
    "rtn": rtn,
    "svdquant": svdquant,
    "paper": paper,
    "deepcompressor": deepcompressor,
    "default": pipeline,
    "no_rotation": changed(rotate={"hadamard_sizes": [0]}),
    "no_centering": changed(center={"means": False}),
    "no_gradient": changed(smooth={"gradient_steps": 0}),
    "absmax_magnitude": changed(smooth={"magnitude": "absmax"}),
    "absmax_scales": changed(gptq={"scales": "absmax"}),
    "no_noise": changed(gptq={"noise": 0.0}),
    "no_refits": changed(gptq={"refits": 0}),
    "no_clip": changed(clip={"ratios": [1.0], "exponent_offsets": [0]}),
    "refits_2": changed(gptq={"refits": 2}),
    "rotation_32": changed(rotate={"hadamard_sizes": [0, 32]}),
    "rotation_128": changed(rotate={"hadamard_sizes": [0, 128]}),
}
