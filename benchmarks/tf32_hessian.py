"""How TF32 products of the Hessian change the error of a W4A4 layer, compared with another order of summation.

    python benchmarks/tf32_hessian.py --widths 256 512 --seeds 6    seeded layers of four kinds
    python benchmarks/tf32_hessian.py --root .                      two blocks of the demo, after `dvc repro`

A tensor core rounds both factors to TF32 (10 bits of mantissa) and sums in float32. This script simulates it on the CPU
with rounding to nearest even. The tokens are bfloat16, whose 7 bits TF32 could hold, but the factors are
`token - shift`, which it cannot. Each Hessian is used for the same smoothing and rounding. The numbers are relative
changes of the error on held-out tokens in percent. The Hessian of the same tokens in reverse order is as good as the
first one, so its change shows the noise.

Measured (mean and largest change over int4, mxfp4 and nvfp4):

    144 seeded layers    TF32 +0.00 %, largest 0.87 %    reverse order -0.00 %, largest 0.81 %
    84 sites             TF32 -0.05 %, largest 2.48 %    reverse order +0.08 %, largest 2.65 %
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.layers import KINDS, SEARCH, Layer, real_layers, seeded_layer
from benchmarks.local_compute import local_compute
from benchmarks.recipes import Settings
from stepquant.calibration.replay import replay_block
from stepquant.calibration.trajectories import Trajectories
from stepquant.models.expert import open_expert
from stepquant.models.manifest import read_manifest
from stepquant.quantize.quantized_layer import layer_output, relative_error
from stepquant.recipe.factor import factor_site
from stepquant.recipe.round import round_site
from stepquant.recipe.site_statistics import SiteStatistics

FORMATS = ("int4", "mxfp4", "nvfp4")


@dataclass(frozen=True)
class Change:
    """Relative changes of one layer's held-out error, and how far the TF32 Hessian is from the float32 one."""

    group: str
    tf32: float
    reversed: float
    hessian: float


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Float32 values rounded to 10 bits of mantissa, to nearest even."""
    bits = x.contiguous().view(torch.int32)
    return (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).view(torch.float32)


def hessians(tokens: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Mean of (x - shift)(x - shift)ᵀ over tokens [T, K], three times."""
    centered = tokens.bfloat16().float() - shift
    rounded, backwards = rounded_to_tf32(centered), centered.flip(0).contiguous()
    return {name: x.T @ x / len(x) for name, x in (("ieee", centered), ("tf32", rounded), ("reversed", backwards))}


def with_hessian(statistics: SiteStatistics, H: Tensor) -> SiteStatistics:
    changed = {"hessian": H, "hessian_diagonal": H.diagonal()}
    return SiteStatistics(lambda name: changed[name] if name in changed else statistics.load(name), statistics.bins)


def change(layer: Layer, tokens: Tensor, fmt: str) -> Change:
    """Round a layer under each Hessian and compare the errors of the whole layer on its held-out tokens."""
    settings, statistics = Settings.of(fmt), layer.activations()
    tried = hessians(tokens, statistics.shift)
    factors = factor_site(layer.W, with_hessian(statistics, tried["ieee"]), settings.factor)[0]
    x = torch.cat(statistics.heldout)
    errors = {}
    for name, H in tried.items():
        stored = round_site(layer.W, with_hessian(statistics, H), factors, settings.round)[0]
        output = layer_output(x, stored.layer(factors.transform, settings.scheme), 1.0, 0)
        errors[name] = relative_error(output, x @ layer.W.T).item()
    percent = {name: 100 * (error / errors["ieee"] - 1) for name, error in errors.items()}
    distance = (tried["tf32"] - tried["ieee"]).norm() / tried["ieee"].norm()
    return Change(layer.group, percent["tf32"], percent["reversed"], distance.item())


def seeded(widths: list[int], seeds: int) -> Iterator[tuple[Layer, Tensor]]:
    for width in widths:
        for kind in KINDS:
            for seed in range(seeds):
                layer = seeded_layer(kind, width, seed, tokens_per_column=16)
                assert layer.calibration is not None
                yield layer, layer.calibration[: -min(SEARCH, len(layer.calibration) // 8)]


def demo(root: Path, blocks: int) -> Iterator[tuple[Layer, Tensor]]:
    """The sites of the first blocks of each expert with their tokens of all calibration calls, computed in bfloat16."""
    compute = local_compute("bfloat16")
    manifest = read_manifest(root / "artifacts/model/manifest.json")
    manifest = manifest.model_copy(update={"source": str(root / manifest.source)})
    trajectories = Trajectories(root / "artifacts/trajectories.zarr")
    found: dict[tuple[str, str], Tensor] = {}
    for expert in manifest.experts:
        model = open_expert(manifest, expert, compute)
        calls = [call for call in trajectories.calls(expert) if call.split == "calibration"]
        inputs = model.glue().inputs(trajectories.inputs(calls))
        for index in range(blocks):
            tokens: dict[str, Tensor] = {}
            observe = lambda site, x, _, tokens=tokens: tokens.update({site: x.flatten(0, 1).clone()})  # noqa: E731
            sites = manifest.expert(expert).ordered_sites
            ((_, output),) = replay_block(model.block(index), sites, [(range(len(calls)), inputs)], observe)
            found |= {(expert, f"{index} {site}"): x for site, x in tokens.items()}
            inputs = replace(inputs, hidden_states=output)
    for layer in real_layers(root, list(range(blocks))):
        yield layer, found[layer.group, layer.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="a folder with the demo's artifacts; without it seeded layers")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    print("| format | layers | n | TF32 mean % | largest % | reverse mean % | largest % | distance of H |")
    print("|---" * 8 + "|")
    for fmt in options.formats:
        source = demo(options.root, options.blocks) if options.root else seeded(options.widths, options.seeds)
        changes: dict[str, list[Change]] = {}
        for layer, tokens in source:
            changes.setdefault(layer.group, []).append(change(layer, tokens, fmt))
        for group, found in changes.items():
            tf32, other = [c.tf32 for c in found], [c.reversed for c in found]
            print(
                f"| {fmt} | {group} | {len(found)} | {mean(tf32):+.3f} | {max(tf32, key=abs):+.3f} "
                f"| {mean(other):+.3f} | {max(other, key=abs):+.3f} | {median(c.hessian for c in found):.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
