"""pack@V: writes a variant (recipe/variants.py) as a diffusers checkpoint, from the files of lowrank, gptq and clip."""

import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, Stage, VariantName, described_model, open_stage
from stepquant.calibration.stored_block import StoredBlock
from stepquant.checkpoint.packed import PackedLinear, pack_site
from stepquant.checkpoint.writer import write_checkpoint
from stepquant.command_runner import command, main
from stepquant.compute.progress import track
from stepquant.errors import UserError
from stepquant.formats import eight_bit_partner
from stepquant.models.expert import open_expert
from stepquant.models.manifest import ModelManifest
from stepquant.models.sites import Site
from stepquant.models.source import resolve_source
from stepquant.quantize.quantized_layer import QuantizedLayer
from stepquant.quantize.rotate import SYLVESTER
from stepquant.recipe.assemble import nearest_layer, variant_clip
from stepquant.recipe.schedule_file import ExpertSchedule, read_schedule
from stepquant.recipe.settings import quant_scheme
from stepquant.recipe.shapes import check_shapes
from stepquant.recipe.variants import Variant, packed_variant
from stepquant.runtime.layout import QuantizationSettings
from stepquant.storage.json_files import read_json
from stepquant.torch_setup import torch_dtype

READS = ("compute", "format", "sampling")


@command
def pack(variant: VariantName, params: ParamsFile = Path("params.yaml")) -> None:
    """Write one variant as a diffusers checkpoint, both experts.

    Reads the params sections compute, format and sampling (whose timestep shift the packed scheduler
    gets), artifacts/model and, as far as the variant needs them, artifacts/lowrank, artifacts/residual,
    artifacts/clip and artifacts/schedule.json. Writes artifacts/checkpoints/VARIANT/.
    """
    recipe = packed_variant(variant)
    with open_stage(__file__, READS, params, variant=variant) as stage:
        manifest = described_model()
        source = resolve_source(manifest.source, manifest.revision)
        packers = [Packer(recipe, stage, manifest, expert) for expert in manifest.experts]
        if artifacts.checkpoint(variant).exists():
            shutil.rmtree(artifacts.checkpoint(variant))
        write_checkpoint(
            source,
            artifacts.checkpoint(variant),
            {p.described.subfolder: (p.settings(), p.blocks(), p.model.weights) for p in packers},
            dtype=torch_dtype(stage["compute"].dtype),
            flow_shift=stage["sampling"].flow_shift,
        )


class Packer:
    """Packs one expert of a variant, block by block."""

    def __init__(self, variant: Variant, stage: Stage, manifest: ModelManifest, expert: str):
        """Read what the variant needs to know in advance: rank, mean subtraction and bin edges. Checks shapes."""
        self.variant, self.described = variant, manifest.expert(expert)
        self.sites = self.described.ordered_sites
        self.scheme = quant_scheme(stage["format"])
        # Codes of GPTQ are laid out anew, which needs no device.
        compute = stage["compute"].model_copy(update={"device": "cpu"}) if variant.gptq else stage["compute"]
        self.model = open_expert(manifest, expert, compute)
        self.folders = {
            "lowrank": artifacts.lowrank(expert),
            "residual": artifacts.residual(expert),
            "clip": artifacts.clip(expert),
        }
        self.rank = self._block(0).transform_factors(self.sites[0]).proj_down.shape[1] if variant.low_rank else 0
        check_shapes(manifest, expert, stage["format"], self.rank)
        self.mean_subtraction = (
            variant.low_rank and read_json(self.folders["lowrank"] / "manifest.json")["mean_subtraction"]
        )
        low, high = self.described.t_range
        clip = read_json(self.folders["clip"] / "manifest.json") if variant.clip else {"bin_edges": [high, low]}
        self.edges = tuple(clip["bin_edges"])
        self.schedule = self._read_schedule(expert) if variant.scheduled else None

    def _read_schedule(self, expert: str) -> ExpertSchedule:
        """The precision schedule of this expert. Raises UserError if it was made for other bins or another format."""
        schedule, partner = read_schedule(artifacts.SCHEDULE), eight_bit_partner(self.scheme.activation_format)
        found = schedule.expert(expert)
        if schedule.eight_bit_format != partner.name:
            raise UserError(
                f"{artifacts.SCHEDULE}: its 8-bit format is {schedule.eight_bit_format}, but format.activation goes "
                f"with {partner.name}; run stages sensitivity and schedule again (dvc repro schedule)"
            )
        if tuple(found.bin_edges) != self.edges:
            raise UserError(
                f"{artifacts.SCHEDULE}: made for the bins {found.bin_edges} of {expert}, but the clips have "
                f"{list(self.edges)}; run stages sensitivity and schedule again (dvc repro schedule)"
            )
        return found

    def settings(self) -> QuantizationSettings:
        """The quantization_config of this expert."""
        targets: list[str] = []
        rotations: dict[str, int] = {}
        eight_bit_bins: dict[str, tuple[int, ...]] = {}
        kinds: set[str] = set()
        for index, site in product(range(self.described.blocks), self.sites):
            names = [f"blocks.{index}.{linear}" for linear in site.linears]
            targets += names
            if self.variant.low_rank and (factors := self._block(index).transform_factors(site)).rotation:
                rotations |= dict.fromkeys(names, factors.rotation)
                kinds.add(factors.hadamard)
            if self.schedule and (bins := self.schedule.bins(index, site.name)):
                eight_bit_bins |= dict.fromkeys(names, bins)
        activation = self.scheme.activation if self.variant.activations else None
        return QuantizationSettings(
            weight_format=self.scheme.weight.name,
            activation_format=None if activation is None else activation.name,
            activation_rounding=self.scheme.activation_rounding,
            activation_scales=self.scheme.activation_scales,
            rank=self.rank,
            mean_subtraction=self.mean_subtraction,
            rotations=rotations,
            bin_edges=self.edges,
            targets=tuple(targets),
            eight_bit_format=eight_bit_partner(self.scheme.activation_format).name if eight_bit_bins else None,
            eight_bit_bins=eight_bit_bins,
            hadamard=kinds.pop() if kinds else SYLVESTER,  # of one stage lowrank, so the same at every site
        )

    def blocks(self) -> Iterator[tuple[int, dict[str, PackedLinear]]]:
        """Index and packed linears of every block, computed one block at a time."""
        for index in track(range(self.described.blocks), f"pack {self.described.subfolder}"):
            block = self._block(index)
            packed: dict[str, PackedLinear] = {}
            for site in self.sites:
                packed |= {f"blocks.{index}.{path}": linear for path, linear in self._pack_site(block, site).items()}
            yield index, packed

    def _block(self, index: int) -> StoredBlock:
        return StoredBlock(index, self.model, self.folders)

    def _pack_site(self, block: StoredBlock, site: Site) -> dict[str, PackedLinear]:
        table = block.clip_table(site) if self.variant.clip else None
        clip = variant_clip(self.variant, table, len(self.edges) - 1, self.scheme)
        biases = {linear: self.model.linear_bias(block.index, linear) for linear in site.linears}
        linears = self.described.sites[site.name].linears
        return pack_site(self._layer(block, site), linears, biases, clip, mean_subtraction=self.mean_subtraction)

    def _layer(self, block: StoredBlock, site: Site) -> QuantizedLayer:
        if self.variant.gptq:
            return block.quantized_layer(site, self.scheme)
        factors = block.transform_factors(site) if self.variant.low_rank else None
        return nearest_layer(block.weight(site), factors, self.scheme)


if __name__ == "__main__":
    main(pack)
