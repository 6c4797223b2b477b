"""Recipes: from a layer and a format to a quantized layer. Ours are run by the pipeline's own stages.

The others' are written anew from their descriptions, on this project's numerics, so that a difference in error is one of the method.
Like ours they use the randomized SVD, which makes them several times faster than their own code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stepquant.profiles
from benchmarks.layers import Layer
from stages.blocks import precision_of, site_layer
from stages.clip import clip_site
from stages.gptq import round_site
from stages.lowrank import factor_site
from stepquant.calibration.activations import Activations
from stepquant.formats import get_format, weight_scales
from stepquant.models.sites import Site
from stepquant.params import section
from stepquant.quantize.clip import UNCLIPPED, ClipCandidate, choose_clip, clip_candidates, clip_errors
from stepquant.quantize.layer import LayerFactors, Precision, exact_path, layer_output, relative_error, round_input
from stepquant.quantize.lowrank import low_rank_factors, stored_branch
from stepquant.quantize.refine import pose, rounded_by_gptq
from stepquant.quantize.smooth import nearest_factors, round_to_nearest, search_transform, smoothing_factor
from stepquant.quantize.transform import InputTransform

PROFILES = Path(stepquant.profiles.__file__).parent
SECTIONS = ("format", "smooth", "centre", "rotate", "lowrank", "gptq", "clip")
SITE = Site("layer", ())
RANK = 32
REFINEMENTS = 10


@dataclass(frozen=True)
class Quantized:
    """A quantized layer: its factors, and the clip of the activations in each bin (one for all if there is one)."""

    factors: LayerFactors
    clips: list[ClipCandidate] = field(default_factory=lambda: [UNCLIPPED])

    def outputs(self, x: Tensor, W: Tensor, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens x [T, K] of bin b: with quantized weights, with both quantized, with quantized activations alone; [T, N]."""
        clip, factors, precision = self.clips[b % len(self.clips)], self.factors, self.factors.precision
        weights_only = replace(factors, precision=replace(precision, activation=None))
        seen = round_input(factors.transform.apply(x), precision, clip.ratio, clip.exponent_offset)
        perfect = factors.transform.residual(W, factors.proj_down, factors.proj_up)
        return (
            layer_output(x, weights_only, 1.0, 0),
            layer_output(x, factors, clip.ratio, clip.exponent_offset),
            seen @ perfect.T + exact_path(x, factors),
        )


Recipe = Callable[[Layer, str], Quantized]


# --- ours: the stages lowrank, gptq and clip on one layer -----------------------------------------------------------------


@dataclass(frozen=True)
class OneLayer:
    """Takes the place of `stages.blocks.Block`: one site, with what the stages made so far, by stage and name."""

    layer: Layer
    made: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    index: int = 0

    @cached_property
    def _activations(self) -> Activations:
        return self.layer.activations()

    def weight(self, site: Site) -> Tensor:
        return self.layer.W

    def activations(self, site: Site) -> Activations:
        return self._activations

    def factor(self, stage: str, name: str) -> Tensor:
        return self.made[stage, name]

    def keep(self, stage: str, factors: Mapping[str, Tensor]) -> None:
        self.made.update({(stage, f"{SITE.name}.{key}"): value for key, value in factors.items()})


def pipeline(layer: Layer, fmt: str, **changes: dict[str, Any]) -> Quantized:
    """The demo profile's recipe in a format, with keys of params sections changed."""
    return clipped(*rounded(*factored(layer, fmt, **changes)))


Stage = dict[str, Any]  # the params sections, which is all that a site's work takes of a stage


def factored(layer: Layer, fmt: str, **changes: dict[str, Any]) -> tuple[Stage, OneLayer]:
    """What stage lowrank leaves, and the params it had."""
    stage = {name: section(PROFILES / "demo.yaml", name) for name in SECTIONS}
    for name, keys in ({"format": {"weight": fmt, "activation": fmt}} | changes).items():
        stage[name] = stage[name].model_copy(update=keys)
    block = OneLayer(layer)
    block.keep("lowrank", factor_site(stage, block, SITE)[0])
    return stage, block


def rounded(stage: Stage, block: OneLayer) -> tuple[Stage, OneLayer]:
    """The same after stage gptq."""
    block.keep("residual", round_site(stage, "layer", block, SITE)[0])
    return stage, block


def clipped(stage: Stage, block: OneLayer) -> Quantized:
    """The finished layer, after stage clip."""
    clip = clip_site(stage, block, SITE)[0]
    clips = [ClipCandidate(ratio, offset) for ratio, offset in zip(clip["ratio"].tolist(), clip["exponent"].tolist())]
    return Quantized(site_layer(block, SITE, precision_of(stage["format"])), clips)


def changed(**changes: dict[str, Any]) -> Recipe:
    return partial(pipeline, **changes)


# --- others' --------------------------------------------------------------------------------------------------------------


def rtn(layer: Layer, fmt: str) -> Quantized:
    """Rounding to nearest, and nothing else."""
    ones = InputTransform.smoothing(torch.ones(layer.W.shape[1], dtype=torch.bfloat16))
    return Quantized(nearest_factors(layer.W, ones, rank=0, seed=0, precision=_precision(fmt)))


def svdquant(layer: Layer, fmt: str) -> Quantized:
    """arXiv 2411.05007 in short: smoothing by absmax with a searched alpha, branch, rounding to nearest."""
    exponents = [(alpha, 1 - alpha) for alpha in (0.3, 0.4, 0.5, 0.6, 0.7)]
    return Quantized(_smoothed_by_search(layer, layer.activations(), exponents, _precision(fmt)))


def paper(layer: Layer, fmt: str) -> Quantized:
    """arXiv 2605.27003: rank 16, alpha 0.5, weight scales by floor, GPTQ without act-order on quantized inputs, clip grid."""
    activations, precision = layer.activations(), replace(_precision(fmt), weight_rounding="floor")
    smooth = smoothing_factor(activations.absmax.amax(0), layer.W.abs().amax(0), alpha=0.5, beta=0.5)
    factors = nearest_factors(layer.W, InputTransform.smoothing(smooth), rank=16, seed=0, precision=precision)
    factors = _rounded_by_gptq(layer, activations, factors, act_order=False)
    candidates = clip_candidates([0.6, 0.7, 0.8, 0.9, 1.0], [-1, 0, 1], precision.activation)
    errors = clip_errors(activations.search, layer.W, factors, candidates)
    return Quantized(factors, [candidates[i] for i in choose_clip(errors).per_bin])


def deepcompressor(layer: Layer, fmt: str) -> Quantized:
    """The full recipe behind SVDQuant's checkpoints: a grid of 39 (alpha, beta) on the output error, ten refinements of the branch
    against rounding to nearest with the best by output error kept, then GPTQ with act-order; all scales from absmax."""
    activations, alphas = layer.activations(), [i / 20 for i in range(1, 21)]
    exponents = [(alpha, 1 - alpha) for alpha in alphas] + [(alpha, 0.0) for alpha in alphas[:-1]]
    factors = _smoothed_by_search(layer, activations, exponents, _precision(fmt))
    factors = _refined_to_nearest(layer.W, torch.cat(activations.search), factors)
    return Quantized(_rounded_by_gptq(layer, activations, factors, act_order=True))


def _precision(fmt: str) -> Precision:
    return Precision(get_format(fmt), "ceil", get_format(fmt), "ceil")


def _smoothed_by_search(layer: Layer, activations: Activations, exponents: list[tuple[float, float]], precision: Precision) -> LayerFactors:
    """Smoothing by absmax with the best of some exponents, branch, and rounding to nearest."""
    span = activations.absmax.amax(0)
    nothing = torch.zeros(len(span), dtype=torch.bfloat16)
    x = torch.cat(activations.search)
    found = search_transform(layer.W, x, span, nothing, exponents, [0], rank=RANK, seed=0, precision=precision)
    return round_to_nearest(layer.W, found.transform, found.proj_down, found.proj_up, precision)


def _refined_to_nearest(W: Tensor, x: Tensor, factors: LayerFactors) -> LayerFactors:
    """Branch = SVD(W*s - Q), Q = nearest(W*s - branch), in turn; the one with the smallest output error on x [T, K]."""
    reference, smooth, rank = x @ W.T, factors.transform.smooth, factors.proj_down.shape[1]
    tried = [factors]
    for _ in range(REFINEMENTS):
        rounded = factors.precision.weight.decode(tried[-1].codes, tried[-1].scales)
        branch = stored_branch(*low_rank_factors(W * smooth.float() - rounded, rank, seed=0), smooth)
        tried.append(round_to_nearest(W, factors.transform, *branch, factors.precision))
    return min(tried, key=lambda f: relative_error(layer_output(x, f, 1.0, 0), reference).item())


def _rounded_by_gptq(layer: Layer, activations: Activations, factors: LayerFactors, *, act_order: bool) -> LayerFactors:
    """The same layer with its residual rounded by GPTQ for quantized inputs, scales from absmax.

    Of real sites only the second moments of unquantized inputs are kept; there these have to do.
    """
    transform, precision = factors.transform, factors.precision
    if layer.calibration is None:
        H = transform.moments(activations.second_moment_about(transform.mean))
    else:
        seen = round_input(transform.apply(layer.calibration), precision, 1.0, 0)
        H = seen.T @ seen / len(seen)
    problem = pose(layer.W, transform, H, None, damping=0.01, act_order=act_order)
    choose_scales = partial(weight_scales, precision.weight, rounding=precision.weight_rounding)
    return rounded_by_gptq(problem, factors.proj_down, factors.proj_up, precision, choose_scales)


RECIPES: dict[str, Recipe] = {
    "rtn": rtn,
    "svdquant": svdquant,
    "paper": paper,
    "deepcompressor": deepcompressor,
    "default": pipeline,
    "no_rotation": changed(rotate={"blocks": [0]}),
    "no_centring": changed(centre={"means": False}),
    "no_gradient": changed(smooth={"gradient_steps": 0}),
    "absmax_span": changed(smooth={"span": "absmax"}),
    "absmax_scales": changed(gptq={"scales": "absmax"}),
    "no_noise": changed(gptq={"noise": 0.0}),
    "no_refits": changed(gptq={"refits": 0}),
    "no_clip": changed(clip={"ratios": [1.0], "exponent_offsets": [0]}),
    "refits_2": changed(gptq={"refits": 2}),
    "rotation_32": changed(rotate={"blocks": [0, 32]}),
    "rotation_128": changed(rotate={"blocks": [0, 128]}),
}
