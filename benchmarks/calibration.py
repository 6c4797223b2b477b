"""How much calibration is enough: the layer error on held-out tokens as one parameter of calibration grows.

    python benchmarks/calibration.py trajectories.calibration_prompts 1 2 4 8
    python benchmarks/calibration.py capture.search_tokens 32 64 128 256 512
    python benchmarks/calibration.py capture.steps_per_bin 1 2 4 null --with sampling.steps=40

Runs the pipeline up to the packed variant `full` in a copy of this checkout, once per value. The held-out tokens are
always those of the current params (with the changes of --with), so that the numbers of different values are comparable.
Prints the geometric mean over sites, blocks and bins per expert, and per kind of site.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.checkout import Checkout, temporary_checkout
from stages import _artifacts as artifacts
from stepquant.evaluate.layers import LayerError
from stepquant.evaluate.packed_layers import layer_errors
from stepquant.models.manifest import read_manifest
from stepquant.params import section

VARIANT = "full"


def prepare(checkout: Checkout) -> Path:
    """A folder to measure in: the held-out tokens of the current params, and the checkout's model and checkpoints."""
    checkout.repro("capture")
    folder = checkout.root.parent / "measured"
    (folder / "artifacts").mkdir(parents=True)
    shutil.copytree(checkout.root / "artifacts/activations", folder / "artifacts/activations")
    for name in ("params.yaml", "data", "artifacts/model", "artifacts/checkpoints"):
        (folder / name).symlink_to(checkout.root / name)
    return folder


def layer_errors_of(checkout: Checkout, folder: Path) -> list[LayerError]:
    """The held-out error of every packed layer."""
    checkout.repro(f"pack@{VARIANT}")
    os.chdir(folder)
    compute = section(Path("params.yaml"), "compute")
    torch.set_num_threads(compute.threads)
    return list(
        layer_errors(read_manifest(artifacts.MODEL), compute, artifacts.checkpoint(VARIANT), artifacts.activations)
    )


def means(errors: Iterable[LayerError]) -> dict[str, float]:
    """Geometric means: of each expert, then of each kind of site over both experts."""
    groups: dict[str, list[float]] = {}
    for error in errors:
        groups.setdefault(error.expert, []).append(error.error)
    for error in errors:
        groups.setdefault(error.site, []).append(error.error)
    return {name: geometric_mean(values) for name, values in groups.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("key", help="a parameter of calibration, such as trajectories.calibration_prompts")
    parser.add_argument("values", nargs="+", type=yaml.safe_load)
    parser.add_argument(
        "--with", nargs="*", default=[], dest="changes", help="KEY=VALUE of other parameters, for all values alike"
    )
    arguments = parser.parse_args()
    with temporary_checkout() as checkout:
        for change in arguments.changes:
            key, value = change.split("=")
            checkout.set(key, yaml.safe_load(value))
        folder = prepare(checkout)
        for i, value in enumerate(arguments.values):
            checkout.set(arguments.key, value)
            found = means(layer_errors_of(checkout, folder))
            if i == 0:
                print(f"| {arguments.key} | {' | '.join(found)} |\n{'|---' * (len(found) + 1)}|")
            print(f"| {value} | {' | '.join(f'{error:.4f}' for error in found.values())} |", flush=True)


if __name__ == "__main__":
    main()
