"""pack@V: assemble a variant from the cached factors and write it as a loadable diffusers checkpoint.

| variant       | smoothing and branch | rounding | activations  | clip                |
|---------------|----------------------|----------|--------------|---------------------|
| w4a16         | yes                  | GPTQ     | unquantized  | -                   |
| rtn           | no                   | nearest  | 4-bit        | none                |
| svdquant      | yes                  | nearest  | 4-bit        | none                |
| svdquant_gptq | yes                  | GPTQ     | 4-bit        | none                |
| one_clip      | yes                  | GPTQ     | 4-bit        | one per site        |
| full          | yes                  | GPTQ     | 4-bit        | one per site and bin |
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from stages import artifacts
from stages.blocks import Block, check_shapes, precision_of, site_branch, site_layer, site_transform
from stages.common import ParamsFile, Stage, Variant, open_stage, read_json
from stages.expert import open_expert
from stepquant.checkpoint.layout import QuantizationSettings
from stepquant.checkpoint.packed import PackedLinear, pack_linear
from stepquant.checkpoint.writer import write_checkpoint
from stepquant.commands import command, main
from stepquant.compute.progress import track
from stepquant.errors import UserError
from stepquant.formats import Scales
from stepquant.models.sites import WAN_SITES, Site
from stepquant.models.source import resolve_source
from stepquant.quantize.layer import LayerFactors
from stepquant.quantize.smooth import round_to_nearest
from stepquant.quantize.transform import InputTransform

READS = ("compute", "format")


@dataclass(frozen=True)
class Recipe:
    """What of the cached factors a variant takes: the table above, in code. clip is the prefix of the clip table's names."""

    branch: bool
    gptq: bool
    activations: bool
    clip: str | None


RECIPES = {
    "w4a16": Recipe(branch=True, gptq=True, activations=False, clip=None),
    "rtn": Recipe(branch=False, gptq=False, activations=True, clip=None),
    "svdquant": Recipe(branch=True, gptq=False, activations=True, clip=None),
    "svdquant_gptq": Recipe(branch=True, gptq=True, activations=True, clip=None),
    "one_clip": Recipe(branch=True, gptq=True, activations=True, clip="single_"),
    "full": Recipe(branch=True, gptq=True, activations=True, clip=""),
}


@command
def pack(variant: Variant, params: ParamsFile = Path("params.yaml")) -> None:
    """Write one variant as a diffusers checkpoint, both experts.

    Reads the params sections compute and format, artifacts/model and, as far as the
    variant needs them, artifacts/lowrank, artifacts/residual and artifacts/clip. Writes artifacts/checkpoints/VARIANT/.
    """
    if variant not in RECIPES:
        raise UserError(f"--variant {variant}; allowed: {', '.join(RECIPES)}")
    with open_stage(__file__, READS, params, variant=variant) as stage:
        manifest = read_json(artifacts.MODEL)
        source = resolve_source(manifest["source"], manifest["revision"])
        packers = [Packer(RECIPES[variant], stage, manifest, expert) for expert in manifest["experts"]]
        if artifacts.checkpoint(variant).exists():
            shutil.rmtree(artifacts.checkpoint(variant))
        write_checkpoint(source, artifacts.checkpoint(variant), {p.subfolder: (p.settings(), p.blocks()) for p in packers})


class Packer:
    """One expert on its way into a checkpoint, block by block."""

    def __init__(self, recipe: Recipe, stage: Stage, manifest: dict[str, Any], expert: str):
        formats = stage["format"]
        self.recipe, self.expert = recipe, expert
        self.described = manifest["experts"][expert]
        self.subfolder = self.described["subfolder"]
        self.precision = precision_of(formats)
        self.model = open_expert(manifest, expert, stage["compute"])
        self.folders = {"lowrank": artifacts.lowrank(expert), "residual": artifacts.residual(expert), "clip": artifacts.clip(expert)}
        self.rank = self._block(0).factor("lowrank", "attn1.qkv.proj_down").shape[1] if recipe.branch else 0
        check_shapes(manifest, expert, formats, self.rank)
        self.centred = recipe.branch and read_json(self.folders["lowrank"] / "manifest.json")["centred"]
        low, high = self.described["t_range"]
        clip = read_json(self.folders["clip"] / "manifest.json") if recipe.clip is not None else {"bin_edges": [high, low]}
        self.edges = tuple(clip["bin_edges"])

    def settings(self) -> QuantizationSettings:
        """What config.json says about this expert."""
        activation = self.precision.activation.name if self.recipe.activations else None
        targets, rotations = [], {}
        for index, site in product(range(self.described["blocks"]), WAN_SITES):
            names = [f"blocks.{index}.{linear}" for linear in site.linears]
            rotation = site_transform(self._block(index), site).rotation if self.recipe.branch else 0
            targets += names
            rotations |= dict.fromkeys(names, rotation) if rotation else {}
        return QuantizationSettings(
            weight_format=self.precision.weight.name,
            activation_format=activation,
            activation_rounding=self.precision.activation_rounding,
            rank=self.rank,
            centred=self.centred,
            rotations=rotations,
            bin_edges=self.edges,
            targets=tuple(targets),
        )

    def blocks(self) -> Iterator[tuple[int, dict[str, PackedLinear]]]:
        """Every block's packed linears, made when asked for."""
        for index in track(range(self.described["blocks"]), f"pack {self.subfolder}"):
            block = self._block(index)
            packed = {}
            for site in WAN_SITES:
                packed |= self._pack_site(block, site)
            yield index, packed

    def _block(self, index: int) -> Block:
        return Block(index, self.model, self.folders)

    def _pack_site(self, block: Block, site: Site) -> dict[str, PackedLinear]:
        layer = self._layer(block, site)
        ratio, exponent = self._clip(block, site)
        packed, start = {}, 0
        for linear in site.linears:
            rows = slice(start, start := start + self.described["sites"][site.name]["linears"][linear][0])
            bias = self.model.linear_bias(block.index, linear)
            packed[f"blocks.{block.index}.{linear}"] = pack_linear(
                layer.codes[rows].cpu(),
                Scales(layer.scales.group[rows].cpu(), layer.scales.tensor),
                layer.transform.smooth.cpu(),
                layer.proj_down.cpu() if self.rank else None,
                layer.proj_up[rows].cpu() if self.rank else None,
                ratio,
                exponent,
                layer.transform.mean.cpu() if self.centred else None,
                (bias.float() + layer.offset[rows]).to(bias.dtype).cpu() if self.centred else None,
            )
        return packed

    def _layer(self, block: Block, site: Site) -> LayerFactors:
        """The site's factors as the recipe wants them."""
        if self.recipe.gptq:
            return site_layer(block, site, self.precision)
        W = block.weight(site)
        if self.recipe.branch:
            return round_to_nearest(W, site_transform(block, site), *site_branch(block, site, "lowrank"), self.precision)
        ones = torch.ones(W.shape[1], dtype=torch.bfloat16, device=W.device)
        plain = InputTransform.smoothing(ones)
        return round_to_nearest(W, plain, ones.new_zeros(W.shape[1], 0), ones.new_zeros(W.shape[0], 0), self.precision)

    def _clip(self, block: Block, site: Site) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Clip ratio and exponent offset per bin, as the checkpoint stores them; a site without t gets its one clip in every bin."""
        bins = len(self.edges) - 1
        if not self.recipe.activations:
            return None, None
        ratio, exponent = torch.ones(bins), torch.zeros(bins, dtype=torch.int8)
        if self.recipe.clip is not None:
            ratio, exponent = (block.factor("clip", f"{site.name}.{self.recipe.clip}{name}").cpu().expand(bins) for name in ("ratio", "exponent"))
        return ratio.contiguous(), exponent.contiguous() if self.precision.activation.name == "mxfp4" else None


if __name__ == "__main__":
    main(pack)
