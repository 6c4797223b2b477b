"""Layer error per site by the dtype in which the corrected bias is stored, on the finished demo (`make demo` first).

    python benchmarks/bias_dtype.py

Mean subtraction adds the mean's contribution to the bias. The source's bias is rounded to a dtype, as a source of that
dtype has it; then the corrected bias is stored in the same dtype, or in float32. Held-out tokens, geometric means over
blocks and bins. The last two columns compute the layer in bfloat16 instead of float32.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stages import _artifacts as artifacts
from stepquant import params as parameters
from stepquant.calibration.statistics_files import read_statistics, site_folder
from stepquant.evaluate.packed_layers import PackedExpert
from stepquant.models.denoiser import Denoiser
from stepquant.models.expert import open_expert
from stepquant.models.manifest import read_manifest
from stepquant.models.sites import WAN_SITES, Site
from stepquant.quantize.quantized_layer import relative_error
from stepquant.torch_setup import prepare_arithmetic

SOURCES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
COLUMNS = ("float32", *(f"{name} source: as the source" for name in SOURCES), "run: bfloat16", "run: float32")


def site_errors(
    model: Denoiser, packed: PackedExpert, index: int, site: Site, heldout: list[torch.Tensor]
) -> Iterator[tuple[str, float]]:
    """The error of one site in every bin, by column."""
    W = torch.cat([model.linear_weight(index, linear) for linear in site.linears])
    source = torch.cat([model.linear_bias(index, linear).float() for linear in site.linears])
    linears = packed.linears(index, site)
    means = [linear.bias.clone() for linear in linears]
    offset = torch.cat(means) - source  # the contribution of the mean
    for b, x in enumerate(heldout):
        reference = x @ W.T
        for linear in linears:
            linear.bias.zero_()
        y = packed.output(linears, x, b)
        yield "float32", relative_error(y + offset, reference).item()
        for name, dtype in SOURCES.items():
            rounded = source.to(dtype).float()
            stored = (rounded + offset).to(dtype).float()
            yield f"{name} source: as the source", relative_error(y + stored - rounded, reference).item()
        for name in ("bfloat16", "float32"):
            for linear, mean in zip(linears, means):
                linear.bias.copy_(mean.to(SOURCES[name]))
            found = packed.output(linears, x.bfloat16(), b).float() - source
            yield f"run: {name}", relative_error(found, reference).item()


def main() -> None:
    """Print the table."""
    prepare_arithmetic(1)
    manifest = read_manifest(artifacts.MODEL)
    compute = parameters.section(Path("params.yaml"), "compute", None)
    print(f"| expert | site | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    for expert, described in manifest.experts.items():
        model = open_expert(manifest, expert, compute)
        packed = PackedExpert(artifacts.checkpoint("full") / described.subfolder, compute.device)
        found = defaultdict(list)
        for site in WAN_SITES:
            for index in range(described.blocks):
                folder = site_folder(artifacts.activations(expert), index, site.name)
                for column, error in site_errors(
                    model, packed, index, site, read_statistics(folder, compute.device).heldout
                ):
                    found[site.name, column].append(error)
                    found["all", column].append(error)
        for name in (*(site.name for site in WAN_SITES), "all"):
            errors = [math.exp(sum(map(math.log, found[name, c])) / len(found[name, c])) for c in COLUMNS]
            print(f"| {expert} | {name} | {' | '.join(f'{error:.4f}' for error in errors)} |")


if __name__ == "__main__":
    main()
