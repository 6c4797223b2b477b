"""Seconds of the recipe on one linear of Wan2.2-I2V-A14B, by function, with peers for comparison.

    python benchmarks/real_layer.py                          5120 x 5120, and ffn.down (5120 x 13824); one thread
    python benchmarks/real_layer.py --layers 1024x1024       outputs x inputs
    python benchmarks/real_layer.py --svd                    also a full SVD of the first layer's weight: 160 s

The recipe is all of smoothing and rotation search, low-rank branch, GPTQ with act-order and the refits of the
profile, and clipping search, on 2,048 search tokens of a seeded layer. The Hessian is given, as stage capture makes
it. Seconds are processor time, which with one thread is the wall time of a quiet machine. Own seconds of a function
exclude our other functions that it calls, so a matrix product counts for the function that contains it.
"""

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.layers import KINDS, Layer, seeded_layer
from benchmarks.peers import PEERS, skipped
from benchmarks.recipes import pipeline
from stepquant.quantize.quantized_layer import relative_error

SEED = 100
CALIBRATION = 16384  # tokens, at least one per column
SHOWN = 12
# Names of torch's routines in the profile, and what they do here.
ROUTINES = {
    "linalg_cholesky_ex": "Cholesky",
    "linalg_solve_triangular": "triangular solve",
    "linalg_svd": "SVD of the sketch",
    "linalg_qr": "QR of the sketch",
}
PARTS = {"factor_site": "smoothing, rotation, branch", "round_site": "GPTQ and refits", "clip_site": "clipping search"}


def make_layer(kind: str, outputs: int, inputs: int) -> Layer:
    """A seeded layer with its statistics ready."""
    layer = seeded_layer(kind, inputs, SEED, max(1, CALIBRATION // inputs))
    statistics = layer.activations()
    W = torch.cat([layer.W] * -(-outputs // inputs))[:outputs].clone()
    return replace(layer, name=f"{outputs} x {inputs}", W=W, activations=lambda: statistics, calibration=None)


def timed(work: Callable[[], object]) -> tuple[object, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def profiled(layer: Layer, fmt: str) -> tuple[object, pstats.Stats]:
    profile = cProfile.Profile(time.process_time)
    result = profile.runcall(pipeline, layer, fmt)
    return result, pstats.Stats(profile)


def error(quantized: object, layer: Layer) -> float:
    """W4A4 error on held-out tokens."""
    x = layer.activations().heldout[0]
    return relative_error(quantized.outputs(x, layer.W, 0)[1], x @ layer.W.T).item()


def show_profile(stats: pstats.Stats, seconds: float) -> None:
    """Seconds of each part of the recipe, then own seconds of the slowest functions."""
    print("\n| part | seconds |\n|---|---|")
    for (_, _, function), (_, _, _, cumulative, _) in sorted(stats.stats.items()):
        if function in PARTS:
            print(f"| {PARTS[function]} | {cumulative:.1f} |")
    print("\n| own seconds of | calls | seconds | part |\n|---|---|---|---|")
    for name, (calls, spent) in sorted(own_seconds(stats).items(), key=lambda item: -item[1][1])[:SHOWN]:
        print(f"| {name} | {calls} | {spent:.1f} | {spent / seconds:.0%} |")


def own_seconds(stats: pstats.Stats) -> dict[str, tuple[int, float]]:
    """Calls and seconds of torch's decompositions, and of each function of ours with torch's other work for it."""
    own: dict[str, tuple[int, float]] = {}

    def add(name: str, calls: int, spent: float) -> None:
        before = own.get(name, (0, 0.0))
        own[name] = (before[0] + calls, before[1] + spent)

    for (file, _, function), (_, calls, spent, _, callers) in stats.stats.items():
        routine = next((name for key, name in ROUTINES.items() if key in function), None)
        if routine:
            add(routine, calls, spent)
        elif file.endswith(".py"):
            add(f"`{Path(file).stem}.{function}`", calls, spent)
        for (caller_file, _, caller), (_, _, part, _) in (
            callers.items() if not routine and not file.endswith(".py") else ()
        ):
            add(f"`{Path(caller_file).stem}.{caller}`", 0, part)
    return own


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["5120x5120", "5120x13824"], help="OUTPUTSxINPUTS")
    parser.add_argument("--format", choices=("int4", "mxfp4", "nvfp4"), default="int4")
    parser.add_argument("--kind", choices=KINDS, default="heavy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--svd", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = [name for name, peer in PEERS.items() if options.format in peer.formats and not skipped(name)]
    for i, shape in enumerate(options.layers):
        layer = make_layer(options.kind, *map(int, shape.split("x")))
        (quantized, stats), seconds = timed(lambda: profiled(layer, options.format))
        print(f"\n{layer.name}, {options.format}, {options.threads} threads\n")
        print("| what | processor seconds | W4A4 error, held out |\n|---|---|---|")
        print(f"| the pipeline | {seconds:.1f} | {error(quantized, layer):.4f} |")
        for peer in peers:
            rounded, spent = timed(lambda: PEERS[peer].quantize(layer, options.format))
            print(f"| {peer} | {spent:.1f} | {error(rounded, layer):.4f} |", flush=True)
        if options.svd and i == 0:
            print(f"| a full SVD of the weight | {timed(lambda: torch.linalg.svd(layer.W))[1]:.1f} | |")
        show_profile(stats, seconds)


if __name__ == "__main__":
    main()
