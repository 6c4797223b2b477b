"""What the rounding errors of each site do to the denoiser's output, without sampling a video.

A unit of work is one recorded step of one prompt. Random probes of the guided output are differentiated backwards,
block by block (step_gradients.py). To first order, a probe changes by the products of its gradients with the errors
that a site makes in that step (quantize/error_products.py). The mean square of that change over many probes is the
squared error of the output (Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990).

Files of a unit:

    products.safetensors    products: float32 [probes, errors, blocks, sites, groups], the change of a probe by the
                            errors of a group of neighboring tokens; the errors are ERRORS of recipe/precision.py
    tokens.json             tokens of a call by site

A prompt has the same probes in every step, so that the errors of a site in several steps can be added with their
signs. The errors of the two guidance branches are added as guidance adds their outputs.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepquant import params
from stepquant.calibration.replay import load_glue
from stepquant.calibration.step_gradients import Probes, StepGradients
from stepquant.calibration.stored_block import StoredBlock
from stepquant.calibration.trajectories import Call, Trajectories
from stepquant.formats import Format, eight_bit_partner
from stepquant.models.expert import open_expert
from stepquant.models.manifest import ModelManifest
from stepquant.models.sites import Site
from stepquant.quantize.error_products import LayerPass, error_products
from stepquant.quantize.quantized_layer import QuantizedLayer
from stepquant.recipe.precision import ERRORS
from stepquant.recipe.settings import quant_scheme
from stepquant.storage.json_files import to_json

# The errors of different groups are taken as independent, so with many groups fewer probes are enough.
GROUPS = 64
PRODUCTS, TOKENS = "products.safetensors", "tokens.json"


@dataclass(frozen=True)
class StepSensitivity:
    """The work of one unit: one recorded step of a prompt.

    Attributes:
        expert: name of the expert.
        manifest: the source model.
        trajectories: the artifact with the recorded calls.
        compute: device and dtype.
        format: the formats.
        sources: the expert's artifacts by name: lowrank, residual, clip.
        calls: of the step, one per guidance branch.
        bin: the step's bin.
        probes: what is differentiated.
    """

    expert: str
    manifest: ModelManifest
    trajectories: Path
    compute: params.Compute
    format: params.Format
    sources: dict[str, Path]
    calls: tuple[Call, ...]
    bin: int
    probes: Probes

    def __call__(self, folder: Path) -> None:
        """Write the unit's files.

        Args:
            folder: the unit's folder.

        Raises:
            UserError: a missing or damaged input.
        """
        described = self.manifest.expert(self.expert)
        sites, blocks = described.ordered_sites, described.blocks
        products = torch.zeros(self.probes.count, len(ERRORS), blocks, len(sites), GROUPS)
        tokens: dict[str, int] = {}
        model = open_expert(self.manifest, self.expert, self.compute)
        glue = load_glue(self.manifest.model_dump_json(), self.expert, self.compute)
        trajectories = Trajectories(self.trajectories)
        arguments = [trajectories.inputs([call]) for call in self.calls]
        with TemporaryDirectory(dir=folder) as scratch:
            step = StepGradients(model, glue, described, arguments, self.probes, Path(scratch))
            for index in reversed(range(blocks)):
                stored = StoredBlock(index, model, self.sources)
                layers = [self._layer(stored, site) for site in sites]
                for branch, probe, passes in step.block(index):
                    for s, (site, layer) in enumerate(zip(sites, layers)):
                        found = layer.products(passes[site.name])
                        tokens[site.name] = found.shape[1]
                        products[probe, :, index, s] += grouped(found, site, branch, len(self.calls)).cpu()
        save_file({"products": products}, folder / PRODUCTS)
        (folder / TOKENS).write_text(to_json(tokens))

    def _layer(self, block: StoredBlock, site: Site) -> "_Layer":
        scheme, table = quant_scheme(self.format), block.clip_table(site)
        b = self.bin if site.depends_on_timestep else 0
        bias = torch.cat([block.model.linear_bias(block.index, linear) for linear in site.linears]).float()
        clip, exponent_offset = table.ratio[b].item(), int(table.exponent[b])
        layer, wide = block.quantized_layer(site, scheme), eight_bit_partner(scheme.activation_format)
        return _Layer(layer, bias, clip, exponent_offset, wide)


@dataclass(frozen=True)
class _Layer:
    """A quantized site in one bin."""

    layer: QuantizedLayer
    bias: Tensor
    clip: float
    exponent_offset: int
    wide: Format

    def products(self, found: LayerPass) -> Tensor:
        """The products of a call, [errors, T]."""
        without_bias = replace(found, y=found.y.float() - self.bias)
        return error_products(without_bias, self.layer, self.clip, self.exponent_offset, self.wide)


def grouped(products: Tensor, site: Site, branch: int, branches: int) -> Tensor:
    """Sums over groups of neighboring tokens.

    Args:
        products: [errors, T] of a call.
        site: a token of a video is the same one in both guidance branches. Tokens of the text are not: each branch has
            groups of its own.
        branch: of the call.
        branches: number of guidance branches.

    Returns:
        [errors, GROUPS].
    """
    own = GROUPS // branches if not site.depends_on_timestep else GROUPS
    sums = torch.stack([part.sum(1) for part in products.tensor_split(own, dim=1)], dim=1)
    if own == GROUPS:
        return sums
    padded = sums.new_zeros(len(sums), GROUPS)
    padded[:, branch * own : (branch + 1) * own] = sums
    return padded
