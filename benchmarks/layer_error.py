"""Error, seconds and memory of every recipe and installed peer on single layers; all errors on held-out tokens.

    python benchmarks/layer_error.py                          seeded layers of width 1024, the reporting seeds
    python benchmarks/layer_error.py --seeds tuning ...       for choosing between recipes; never quote these
    python benchmarks/layer_error.py --sites . --blocks 1 4   real sites of the demo model, from ./artifacts
    python benchmarks/layer_error.py --recipes default IDEA   an idea of benchmarks/ideas.py that is not in the default

Columns of the table; errors are ||y - reference|| / ||reference||, over bins the root of their mean square:
    W        quantized weights, unquantized activations
    W4A4     both quantized
    floor    quantized activations, exact weights (with the branch): a lower bound for any rounding of weights
    seconds  of processor time, which other programs on the machine hardly change
    MB       peak resident memory, above the value before
"""

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, geometric_mean

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ideas import IDEAS
from benchmarks.layers import KINDS, Layer, real_layers, seeded_layer
from benchmarks.peers import PEERS, PeerLayer, skipped
from benchmarks.recipes import RECIPES, Quantized
from stepquant.quantize.quantized_layer import relative_error

OURS = RECIPES | IDEAS
SEEDS = {"tuning": range(0, 3), "reporting": range(100, 103)}


@dataclass(frozen=True)
class Result:
    """One recipe in one format on one layer; group and name are those of the layer; bins: W4A4 error per bin."""

    group: str
    name: str
    format: str
    recipe: str
    weight_error: float
    error: float
    floor: float
    seconds: float
    peak_mb: float
    bins: tuple[float, ...]


def measure(layer: Layer, recipe: str, fmt: str) -> Result:
    before, start = _reset_peak_memory(), time.process_time()
    quantized = (PEERS[recipe].quantize if recipe in PEERS else OURS[recipe])(layer, fmt)
    seconds, peak = time.process_time() - start, _memory("VmHWM") - before
    errors = [_errors(quantized, layer.W, b, x) for b, x in enumerate(layer.activations().heldout)]
    weights, both, floors = zip(*errors)
    means = (_root_mean_square(values) for values in (weights, both, floors))
    return Result(layer.group, layer.name, fmt, recipe, *means, seconds, peak, both)


def _errors(quantized: Quantized | PeerLayer, W: Tensor, b: int, x: Tensor) -> list[float]:
    """W, W4A4 and floor on one bin's tokens x [T, K]."""
    reference = x @ W.T
    return [relative_error(y, reference).item() for y in quantized.outputs(x, W, b)]


def _root_mean_square(values: Iterable[float]) -> float:
    return fmean(value**2 for value in values) ** 0.5


def _reset_peak_memory() -> float:
    """Resident MB after returning freed memory; resets the kernel's high-water mark to it (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# --- tables ---


def summary(results: Sequence[Result], mean: Callable[[Iterable[float]], float]) -> str:
    """A table per group of layers, of means over its layers."""
    return "\n\n".join(_table(group, rows, mean) for (group,), rows in _grouped(results, "group").items())


def _table(group: str, results: Sequence[Result], mean: Callable[[Iterable[float]], float]) -> str:
    cells = _grouped(results, "recipe", "format")
    formats = list(dict.fromkeys(r.format for r in results))
    lines = [
        _row(group, *(f"{fmt}: W / W4A4 / floor | seconds, MB" for fmt in formats)),
        "|---" * (2 * len(formats) + 1) + "|",
    ]
    done = {r.recipe for r in results}
    for recipe in filter(done.__contains__, (*OURS, *PEERS)):
        lines.append(_row(f"`{recipe}`", *(_cells(cells.get((recipe, fmt), []), mean) for fmt in formats)))
    return "\n".join(lines)


def _cells(rows: Sequence[Result], mean: Callable[[Iterable[float]], float]) -> str:
    """Of one recipe in one format; empty for a peer without this format."""
    if not rows:
        return " | "
    errors = " / ".join(f"{mean(getattr(r, field) for r in rows):.4f}" for field in ("weight_error", "error", "floor"))
    return f"{errors} | {fmean(r.seconds for r in rows):.1f}, {fmean(r.peak_mb for r in rows):.0f}"


def by_layer(results: Sequence[Result]) -> str:
    """W4A4 error of each layer in each of its bins, a recipe per column."""
    recipes = list(dict.fromkeys(r.recipe for r in results))
    lines = [_row("layer", "bin", "format", *(f"`{recipe}`" for recipe in recipes)), "|---" * (len(recipes) + 3) + "|"]
    for (group, name, fmt), rows in _grouped(results, "group", "name", "format").items():
        for b in range(len(rows[0].bins)):
            errors = {r.recipe: f"{r.bins[b]:.4f}" for r in rows}
            lines.append(_row(f"{group} {name}", str(b), fmt, *(errors.get(recipe, "") for recipe in recipes)))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _grouped(results: Sequence[Result], *fields: str) -> dict[tuple[str, ...], list[Result]]:
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result, field) for field in fields), []).append(result)
    return groups


# --- command ---


def layers(options: argparse.Namespace) -> Iterator[Layer]:
    if options.sites:
        yield from real_layers(options.sites, options.blocks)
        return
    for kind, width, seed in product(options.kinds, options.widths, SEEDS[options.seeds]):
        yield seeded_layer(kind, width, seed, options.tokens_per_column)


def run(options: argparse.Namespace) -> Iterator[Result]:
    runs = [
        (recipe, fmt)
        for fmt, recipe in product(options.formats, options.recipes)
        if recipe in OURS or fmt in PEERS[recipe].formats
    ]
    for recipe, fmt in runs:
        measure(seeded_layer("mild", 256, 0, tokens_per_column=4), recipe, fmt)  # costs of the first call only
    for layer in layers(options):
        for recipe, fmt in runs:
            yield measure(layer, recipe, fmt)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", choices=SEEDS, default="reporting")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["heavy"])
    parser.add_argument("--widths", nargs="+", type=int, default=[1024])
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4", "int4"])
    parser.add_argument("--recipes", nargs="+", choices=[*OURS, *PEERS], default=[*RECIPES, *PEERS])
    parser.add_argument("--tokens-per-column", type=int, default=16)
    parser.add_argument("--sites", type=Path, help="real sites instead: the folder that holds artifacts")
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 4], help="with --sites")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write every single result here")
    options = parser.parse_args()
    options.recipes = [recipe for recipe in options.recipes if not skipped(recipe)]
    return options


@torch.no_grad()
def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    results = []
    for result in run(options):
        results.append(result)
        name = f"{result.group} {result.name} {result.format} {result.recipe}"
        print(f"{name}: {result.error:.4f} in {result.seconds:.1f} s", file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    print(summary(results, geometric_mean if options.sites else fmean))
    if options.sites:
        print("\n" + by_layer(results))


if __name__ == "__main__":
    main()
