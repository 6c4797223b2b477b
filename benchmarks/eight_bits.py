"""Layer errors with 4-bit and with 8-bit activations beside the same 4-bit weights; all errors on held-out tokens.

    python benchmarks/eight_bits.py                          seeded layers of every kind, the reporting seeds
    python benchmarks/eight_bits.py --sites . --blocks 1 4   real sites of the demo model, from ./artifacts

The layers are those of the demo profile's recipe. 8-bit activations have neither a clip nor an exponent offset, as in
the runtime. Columns; errors are ||y - reference|| / ||reference||, geometric means over layers and bins:
    W              quantized weights, unquantized activations
    W4A4, W4A8     both quantized
    A4, A8         activations alone quantized
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import geometric_mean

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.layer_error import SEEDS
from benchmarks.layers import KINDS, Layer, real_layers, seeded_layer
from benchmarks.recipes import Quantized, pipeline
from stepquant.formats import activation_formats, eight_bit_partner, get_format
from stepquant.quantize.quantized_layer import relative_error

COLUMNS = ("W", "W4A4", "W4A8", "A4", "A8")


def errors(layer: Layer, fmt: str) -> Iterator[list[float]]:
    """The columns for each bin of one layer in one format."""
    four_bits = pipeline(layer, fmt)
    scheme = replace(four_bits.factors.scheme, activation=eight_bit_partner(get_format(fmt)))
    eight_bits = Quantized(replace(four_bits.factors, scheme=scheme))
    for b, x in enumerate(layer.activations().heldout):
        weights, both, activations = _errors(four_bits, layer.W, b, x)
        _, both_of_eight, activations_of_eight = _errors(eight_bits, layer.W, b, x)
        yield [weights, both, both_of_eight, activations, activations_of_eight]


def _errors(quantized: Quantized, W: Tensor, b: int, x: Tensor) -> list[float]:
    reference = x @ W.T
    return [relative_error(y, reference).item() for y in quantized.outputs(x, W, b)]


def layers(options: argparse.Namespace) -> Iterator[Layer]:
    if options.sites:
        yield from real_layers(options.sites, options.blocks)
        return
    for kind, seed in product(KINDS, SEEDS["reporting"]):
        yield seeded_layer(kind, options.width, seed, tokens_per_column=16)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--sites", type=Path, help="real sites instead: the folder that holds artifacts")
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 4], help="with --sites")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = defaultdict(list)
    formats = [fmt for fmt in activation_formats() if get_format(fmt).code_bits == 4]
    for layer in layers(options):
        print(f"{layer.group} {layer.name}", file=sys.stderr)
        for fmt in formats:
            rows[layer.group, fmt] += errors(layer, fmt)
    print(f"| layers | format | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 2)}|")
    for (group, fmt), values in rows.items():
        pair = f"{fmt}, {eight_bit_partner(get_format(fmt)).name}"
        print(f"| {group} | {pair} | {' | '.join(f'{geometric_mean(column):.4f}' for column in zip(*values))} |")


if __name__ == "__main__":
    main()
