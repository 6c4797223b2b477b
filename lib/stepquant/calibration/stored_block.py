"""One block's weights, statistics and factors, from the source model and the artifacts."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from stepquant.calibration.statistics_files import block_name, read_statistics, site_folder
from stepquant.models.denoiser import Denoiser
from stepquant.models.sites import Site
from stepquant.quantize.quantized_layer import QuantizedLayer, QuantScheme
from stepquant.recipe.site_files import ClipTable, ResidualFactors, TransformFactors
from stepquant.recipe.site_statistics import SiteStatistics
from stepquant.storage.read_ahead import FileRange


@dataclass(frozen=True)
class StoredBlock:
    """One block of an expert and the artifacts computed from it. Tensors are read on request, one site at a time.

    Attributes:
        index: number of the block.
        model: the expert's weights; tensors are put onto its device.
        folders: the expert's folder by kind of artifact ("activations", "lowrank", "residual", "clip"); only
            those that are read.
    """

    index: int
    model: Denoiser
    folders: dict[str, Path]

    def file_ranges(self, sites: Iterable[Site]) -> list[FileRange]:
        """What the block's sites read from disk: parts of the weight files, and whole files of the artifacts."""
        linears = (f"blocks.{self.index}.{linear}.weight" for site in sites for linear in site.linears)
        weights = (self.model.weights.info(key) for key in linears)
        folders = (folder / block_name(self.index) for folder in self.folders.values())
        files = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
        return [(info.file, info.start, info.nbytes) for info in weights] + [(file, 0, 0) for file in files]

    def weight(self, site: Site) -> torch.Tensor:
        """The stacked weight [N, K] of a site's linears, float32."""
        return torch.cat([self.model.linear_weight(self.index, linear) for linear in site.linears])

    def statistics(self, site: Site) -> SiteStatistics:
        """The statistics of a site's input. Raises UserError if they are missing or damaged."""
        return read_statistics(site_folder(self.folders["activations"], self.index, site.name), self.model.device)

    def transform_factors(self, site: Site) -> TransformFactors:
        """Input transform and low-rank branch of a site. Raises UserError if the file is missing or damaged."""
        return TransformFactors.from_file(
            self.folders["lowrank"] / block_name(self.index), site.name, self.model.device
        )

    def residual_factors(self, site: Site) -> ResidualFactors:
        """Rounded residual and refitted branch of a site. Raises UserError if the file is missing or damaged."""
        return ResidualFactors.from_file(
            self.folders["residual"] / block_name(self.index), site.name, self.model.device
        )

    def quantized_layer(self, site: Site, scheme: QuantScheme) -> QuantizedLayer:
        """A site's layer with GPTQ's codes. Raises UserError if a file is missing or damaged."""
        return self.residual_factors(site).layer(self.transform_factors(site).transform, scheme)

    def clip_table(self, site: Site) -> ClipTable:
        """A site's clips, on the CPU. Raises UserError if the file is missing or damaged."""
        return ClipTable.from_file(self.folders["clip"] / block_name(self.index), site.name, "cpu")
