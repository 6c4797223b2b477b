"""Error, seconds and memory of every recipe on seeded layers; all errors on tokens that calibration did not see.

    python benchmarks/layer_error.py                          the reporting seeds, 1024 wide, as in docs and issues
    python benchmarks/layer_error.py --seeds tuning ...       for choosing between recipes; never quote these

A layer is y = x @ W.T with a heavy-tailed x [T, K] and W [N, K]. Columns of the table, as ||y - reference|| / ||reference||:
    W       quantized weights, activations left alone
    W4A4    both quantized
    floor   activations quantized, weights perfect (the branch kept): what no better rounding of weights can go below
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from stepquant.formats import get_format
from stepquant.quantize.centre import centre_bias, centred_moments, centred_output
from stepquant.quantize.clip import ClipCandidate, choose_clip, clip_candidates, clip_errors
from stepquant.quantize.gptq import gptq
from stepquant.quantize.layer import LayerFactors, Precision, branch_path, relative_error
from stepquant.quantize.learn import learn_smoothing
from stepquant.quantize.lowrank import residual
from stepquant.quantize.refine import refine
from stepquant.quantize.rotate import rotate
from stepquant.quantize.smooth import nearest_factors, search_smoothing, smoothing_factor

SEEDS = {"tuning": range(0, 3), "reporting": range(100, 103)}
RANK = 32
HELD_OUT = 4096
SEARCH = 2048


@dataclass(frozen=True)
class Kind:
    """A sort of layer. tail: degrees of freedom of Student's t, per value or per token; gain: of the outlier channels;
    shift: size of the channel means, relative to the channel's spread."""

    tail: float
    per_token: bool
    outliers: float
    gain: float
    shift: float


KINDS = {
    "heavy": Kind(tail=4.0, per_token=False, outliers=0.01, gain=30.0, shift=0.0),
    "tokens": Kind(tail=4.0, per_token=True, outliers=0.01, gain=30.0, shift=0.0),
    "mild": Kind(tail=30.0, per_token=False, outliers=0.0, gain=1.0, shift=0.0),
    "shifted": Kind(tail=6.0, per_token=True, outliers=0.01, gain=10.0, shift=1.0),
}


@dataclass(frozen=True)
class Layer:
    """What calibration knows (weight, second moments, absmax, search tokens), and the held-out tokens."""

    W: Tensor
    H: Tensor
    absmax: Tensor
    calibration: Tensor
    search: Tensor
    held_out: Tensor


def make_layer(kind: Kind, width: int, seed: int, tokens_per_column: int) -> Layer:
    """A width x width layer: W Gaussian plus a rank-16 part; x of correlated channels, lognormal in size, with outliers."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W = randn(width, width) / width**0.5 + 0.7 * randn(width, 16) @ randn(16, width) / (16 * width) ** 0.5
    tokens, latent = tokens_per_column * width + HELD_OUT, width // 4
    x = 0.5**0.5 * (randn(tokens, latent) @ randn(latent, width) / latent**0.5 + randn(tokens, width))
    # Student's t: a normal over the root of a mean of squares (a chi-square of `tail` degrees, drawn as a gamma).
    shape = torch.full((tokens, 1 if kind.per_token else width), kind.tail / 2)
    x /= (torch._standard_gamma(shape, generator=generator) * 2 / kind.tail).sqrt_()
    x += kind.shift * randn(width)
    x *= (0.5 * randn(width)).exp()
    x[:, torch.randperm(width, generator=generator)[: int(kind.outliers * width)]] *= kind.gain
    calibration, held_out = x[:-HELD_OUT], x[-HELD_OUT:]
    H = calibration.T @ calibration / len(calibration)
    return Layer(W, H, calibration.abs().amax(0), calibration, calibration[:SEARCH], held_out)


# --- recipes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """What a recipe gives: factors, the clip of the activations, and the channel means [K] taken off before quantizing."""

    factors: LayerFactors
    clip: ClipCandidate
    mean: Tensor


Recipe = Callable[[Layer, Precision], Quantized]


def rtn(layer: Layer, precision: Precision) -> Quantized:
    ones = torch.ones(layer.W.shape[1], dtype=torch.bfloat16)
    return _unclipped(layer, nearest_factors(layer.W, ones, rank=0, seed=0, precision=precision))


def svdquant(layer: Layer, precision: Precision) -> Quantized:
    """Smoothing by absmax with searched alpha, branch, rounding to nearest."""
    candidates = [(alpha, 1 - alpha) for alpha in (0.4, 0.5, 0.6, 0.7)]
    found = search_smoothing(layer.W, layer.absmax, layer.search, candidates, rank=RANK, seed=0, precision=precision)
    return _unclipped(layer, nearest_factors(layer.W, found.smooth, rank=RANK, seed=0, precision=precision))


def svdquant_gptq(layer: Layer, precision: Precision) -> Quantized:
    factors = svdquant(layer, precision).factors
    s = factors.smooth.float()
    return _unclipped(layer, _rounded_by_gptq(layer, factors, layer.H / s[:, None] / s, act_order=True))


def paper(layer: Layer, precision: Precision) -> Quantized:
    """arXiv 2605.27003: rank 16, alpha 0.5, weight scales by floor, GPTQ without act-order on quantized inputs, clip grid."""
    precision = replace(precision, weight_rounding="floor", activation_rounding="ceil")
    smooth = smoothing_factor(layer.absmax, layer.W.abs().amax(0), alpha=0.5, beta=0.5)
    factors = nearest_factors(layer.W, smooth, rank=16, seed=0, precision=precision)
    seen = precision.activation.fake_quantize(layer.calibration / smooth.float(), rounding="ceil")
    factors = _rounded_by_gptq(layer, factors, seen.T @ seen / len(seen), act_order=False)
    clip = _search_clip(layer, factors, [0.6, 0.7, 0.8, 0.9, 1.0], [-1, 0, 1])
    return replace(_unclipped(layer, factors), clip=clip)


def refined(layer: Layer, precision: Precision) -> Quantized:
    """Smoothing by root mean square, scales by error, six refits of the branch, clip search."""
    return _refined(layer, precision, rotation=0, steps=0)


def learned(layer: Layer, precision: Precision) -> Quantized:
    """`refined` with learned smoothing."""
    return _refined(layer, precision, rotation=0, steps=30)


def rotated(layer: Layer, precision: Precision) -> Quantized:
    """`learned` behind a block-Hadamard rotation as wide as the activation's group."""
    return _refined(layer, precision, rotation=precision.activation.group, steps=30)


def centred(layer: Layer, precision: Precision) -> Quantized:
    """`rotated` (nvfp4: `learned`) with the channel means taken off."""
    mean = layer.calibration.mean(0)
    moments = centred_moments(layer.H, mean[None])
    shifted = replace(layer, H=moments, calibration=layer.calibration - mean, search=layer.search - mean)
    return replace((learned if precision.activation.name == "nvfp4" else rotated)(shifted, precision), mean=mean)


RECIPES: dict[str, Recipe] = {f.__name__: f for f in (rtn, svdquant, svdquant_gptq, paper, refined, learned, rotated, centred)}


def _refined(layer: Layer, precision: Precision, *, rotation: int, steps: int) -> Quantized:
    smooth = smoothing_factor(layer.H.diagonal().sqrt(), layer.W.abs().amax(0), alpha=0.7, beta=0.3)
    options = {"rank": RANK, "seed": 0, "precision": precision, "rotation": rotation}
    if steps:
        smooth = learn_smoothing(layer.W, layer.search, smooth, steps=steps, **options)
    factors = refine(layer.W, layer.H, smooth, rounds=6, damping=0.3, **options)
    clip = _search_clip(layer, factors, [1.0, 0.95, 0.9, 0.86, 0.83, 0.8, 0.75], [0])
    return replace(_unclipped(layer, factors), clip=clip)


def _unclipped(layer: Layer, factors: LayerFactors) -> Quantized:
    return Quantized(factors, ClipCandidate(1.0, 0), torch.zeros_like(layer.absmax))


def _rounded_by_gptq(layer: Layer, factors: LayerFactors, H: Tensor, *, act_order: bool) -> LayerFactors:
    R = residual(layer.W, factors.smooth, factors.proj_down, factors.proj_up)
    result = gptq(R, H, factors.scales, factors.precision.weight, damping=0.01, act_order=act_order)
    return replace(factors, codes=result.codes)


def _search_clip(layer: Layer, factors: LayerFactors, ratios: Sequence[float], offsets: Sequence[int]) -> ClipCandidate:
    candidates = clip_candidates(ratios, offsets, factors.precision.activation)
    errors = clip_errors(layer.search, layer.search @ layer.W.T, factors, candidates)
    return candidates[choose_clip(errors[None]).single]


# --- measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    kind: str
    width: int
    seed: int
    format: str
    recipe: str
    weight_error: float
    error: float
    floor: float
    seconds: float
    peak_mb: float


def measure(layer: Layer, recipe: str, format_name: str, kind: str, seed: int) -> Result:
    fmt = get_format(format_name)
    before, start = _reset_peak_memory(), time.perf_counter()
    quantized = RECIPES[recipe](layer, Precision(fmt, "ceil", fmt, "ceil"))
    seconds, peak = time.perf_counter() - start, _memory("VmHWM") - before
    weight_error, error, floor = _errors(layer.held_out, layer.W, quantized)
    return Result(kind, layer.W.shape[1], seed, format_name, recipe, weight_error, error, floor, seconds, peak)


def _errors(x: Tensor, W: Tensor, quantized: Quantized) -> tuple[float, float, float]:
    """Relative error with quantized weights, with both quantized, and with quantized activations alone."""
    factors, clip, mean = quantized.factors, quantized.clip, quantized.mean
    weight_only = replace(factors, precision=replace(factors.precision, activation=None))
    bias = centre_bias(W, mean[None], factors.proj_down, factors.proj_up)
    reference = x @ W.T
    outputs = [centred_output(x, mean, bias, f, clip.ratio, clip.exponent_offset) for f in (weight_only, factors)]
    R = rotate(residual(W, factors.smooth, factors.proj_down, factors.proj_up), factors.rotation)
    seen = factors.precision.activation.fake_quantize(
        rotate((x - mean) / factors.smooth.float(), factors.rotation),
        clip=clip.ratio, exponent_offset=clip.exponent_offset, rounding=factors.precision.activation_rounding,
    )  # fmt: skip
    outputs.append(seen @ R.T + branch_path(x, factors) + bias)
    weight_error, error, floor = (relative_error(y, reference).item() for y in outputs)
    return weight_error, error, floor


def _reset_peak_memory() -> float:
    """Resident MB now, freed memory given back, with the kernel's high-water mark set back to it (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def table(results: Sequence[Result]) -> str:
    """Means over the seeds."""
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        groups.setdefault((r.kind, r.width, r.format, r.recipe), []).append(r)
    lines = [f"{'kind':8} {'width':>5} {'format':6} {'recipe':14} {'W':>7} {'W4A4':>7} {'floor':>7} {'seconds':>8} {'MB':>6}"]
    for (kind, width, name, recipe), group in groups.items():
        fields = ("weight_error", "error", "floor", "seconds", "peak_mb")
        W, W4A4, floor, seconds, mb = (fmean(getattr(r, field) for r in group) for field in fields)
        where = f"{kind:8} {width:5} {name:6} {recipe:14}"
        lines.append(f"{where} {W:7.4f} {W4A4:7.4f} {floor:7.4f} {seconds:8.2f} {mb:6.0f}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> Iterator[Result]:
    for kind, width, seed in product(options.kinds, options.widths, SEEDS[options.seeds]):
        layer = make_layer(KINDS[kind], width, seed, options.tokens_per_column)
        for name, recipe in product(options.formats, options.recipes):
            yield measure(layer, recipe, name, kind, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", choices=SEEDS, default="reporting")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["heavy"])
    parser.add_argument("--widths", nargs="+", type=int, default=[1024])
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4", "int4"])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--tokens-per-column", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write every single result here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for result in run(options):
        results.append(result)
        print(f"seed {result.seed} {result.kind} {result.format} {result.recipe}: {result.error:.4f}", file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
