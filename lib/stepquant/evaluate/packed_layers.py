"""The error of every site on held-out tokens, from the packed linears of a checkpoint.

||Y_q - Y|| / ||Y|| of the output without bias, on tokens of prompts that calibration did not use.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from stepquant.calibration.statistics_files import read_statistics, site_folder
from stepquant.checkpoint.linears import read_linear, read_settings
from stepquant.compute.progress import track
from stepquant.evaluate.layers import LayerError
from stepquant.models.expert import open_expert
from stepquant.models.manifest import ModelManifest
from stepquant.models.sites import Site
from stepquant.models.weights import open_weights
from stepquant.params import Compute
from stepquant.quantize.quantized_layer import relative_error
from stepquant.runtime.linear import W4A4Linear


def layer_errors(
    manifest: ModelManifest, compute: Compute, checkpoint: Path, activations: Callable[[str], Path]
) -> Iterator[LayerError]:
    """The held-out error of every site of every block, per bin.

    Args:
        manifest: The source model.
        compute: Device and dtype.
        checkpoint: Folder of the packed pipeline.
        activations: Expert -> folder of its statistics, which have the held-out tokens.
    """
    for expert, described in manifest.experts.items():
        model = open_expert(manifest, expert, compute)
        packed = PackedExpert(checkpoint / described.subfolder, compute.device)
        for index in track(range(described.blocks), f"layer errors {checkpoint.name} {expert}"):
            for site in described.ordered_sites:
                heldout = read_statistics(site_folder(activations(expert), index, site.name), compute.device).heldout
                W = torch.cat([model.linear_weight(index, linear) for linear in site.linears])
                bias = torch.cat([model.linear_bias(index, linear) for linear in site.linears]).float()
                linears = packed.linears(index, site)
                for b, x in enumerate(heldout):
                    error = relative_error(packed.output(linears, x, b) - bias, x @ W.T).item()
                    yield LayerError(expert, index, site.name, b if site.depends_on_timestep else None, error)


class PackedExpert:
    """The packed linears of one expert, read when they are asked for."""

    def __init__(self, folder: Path, device: str):
        self.weights, self.settings, self.device = open_weights(folder), read_settings(folder), device

    def linears(self, index: int, site: Site) -> list[W4A4Linear]:
        """The linears of a site in the order of their rows in its stacked weight."""
        return [
            read_linear(self.weights, self.settings, f"blocks.{index}.{path}", self.device) for path in site.linears
        ]

    def output(self, linears: list[W4A4Linear], x: Tensor, timestep_bin: int) -> Tensor:
        """Stacked output [T, N] of a site's linears for x [T, K] under the clip of a bin."""
        # A variant without a clip search was packed with one bin over the whole range.
        index = torch.full((1,), min(timestep_bin, self.settings.bins - 1), device=x.device)
        for linear in linears:
            linear.bin.set(index)
        return torch.cat([linear(x) for linear in linears], dim=1)
