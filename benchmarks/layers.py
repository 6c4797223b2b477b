"""Layers to quantize: seeded ones, and real sites from the pipeline's artifacts.

In both cases y = x @ W.T, x [T, K], W [N, K]; calibration and held-out tokens come from different draws or prompts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.local_compute import local_compute
from stepquant.calibration.stored_block import StoredBlock
from stepquant.models.expert import open_expert
from stepquant.models.manifest import read_manifest
from stepquant.recipe.site_statistics import SiteStatistics

HELD_OUT = 4096
SEARCH = 2048


@dataclass(frozen=True)
class Layer:
    """A layer to quantize.

    Attributes:
        group: The layers that one mean is taken over.
        name: This layer within its group.
        W: float32 [N, K].
        activations: Makes or reads the statistics of the calibration tokens, with the held-out tokens.
        calibration: The calibration tokens [T, K]; None where only statistics are stored.
    """

    group: str
    name: str
    W: Tensor
    activations: Callable[[], SiteStatistics]
    calibration: Tensor | None


@dataclass(frozen=True)
class Kind:
    """A kind of synthetic layer.

    Attributes:
        tail: Degrees of freedom of Student's t.
        per_token: Whether the t variable is one per token instead of one per value.
        outliers: Part of the channels that are outliers.
        gain: Factor of the outlier channels.
        shift: Magnitude of the channel means, relative to the channel's standard deviation.
    """

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


def seeded_layer(kind: str, width: int, seed: int, tokens_per_column: int) -> Layer:
    """A width x width layer: W Gaussian plus rank 16; x correlated, with lognormal magnitudes and outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    W = _randn(generator, width, width) / width**0.5
    W += 0.7 * _randn(generator, width, 16) @ _randn(generator, 16, width) / (16 * width) ** 0.5
    x = _tokens(KINDS[kind], width, tokens_per_column * width + HELD_OUT, generator)
    calibration, held_out = x[:-HELD_OUT], x[-HELD_OUT:]
    return Layer(f"{kind} {width}", f"seed {seed}", W, partial(_statistics, calibration, held_out), calibration)


def _tokens(kind: Kind, width: int, tokens: int, generator: torch.Generator) -> Tensor:
    """x [tokens, width]; half of a channel's variance comes from width / 4 latent channels."""
    latent = width // 4
    x = _randn(generator, tokens, latent) @ _randn(generator, latent, width) / latent**0.5
    x = 0.5**0.5 * (x + _randn(generator, tokens, width))
    # Student's t: a normal over the root of a mean of squares (a chi-square of `tail` degrees, drawn as a gamma).
    shape = torch.full((tokens, 1 if kind.per_token else width), kind.tail / 2)
    x /= (torch._standard_gamma(shape, generator=generator) * 2 / kind.tail).sqrt_()
    x += kind.shift * _randn(generator, width)
    x *= (0.5 * _randn(generator, width)).exp()
    x[:, torch.randperm(width, generator=generator)[: int(kind.outliers * width)]] *= kind.gain
    return x


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _statistics(tokens: Tensor, held_out: Tensor) -> SiteStatistics:
    """Statistics of one timestep bin as stage capture stores them; the last eighth of the tokens is for validation."""
    reserved = min(SEARCH, len(tokens) // 8)
    calibration, validation = tokens[:-reserved], tokens[-reserved:]
    absmax, mean = calibration.abs().amax(0), calibration.mean(0)
    centered = calibration - mean
    H = centered.T @ centered / len(centered)
    kept = {"shift": mean, "hessian": H, "hessian_diagonal": H.diagonal(), "absmax": absmax[None], "mean": mean[None]}
    kept |= {"search.0": calibration[:SEARCH], "validation.0": validation, "heldout.0": held_out}
    return SiteStatistics(kept.__getitem__, bins=1)


def real_layers(root: Path, blocks: list[int]) -> Iterator[Layer]:
    """Every site of some blocks of every expert, from the folder that holds `artifacts` and the source model."""
    manifest = read_manifest(root / "artifacts/model/manifest.json")
    manifest = manifest.model_copy(update={"source": str(root / manifest.source)})
    compute = local_compute()
    for expert in manifest.experts:
        model = open_expert(manifest, expert, compute)
        for index in blocks:
            block = StoredBlock(index, model, {"activations": root / f"artifacts/activations/{expert}.zarr"})
            for site in manifest.expert(expert).ordered_sites:
                yield Layer(expert, f"{index} {site.name}", block.weight(site), partial(block.statistics, site), None)
