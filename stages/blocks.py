"""What lowrank, gptq and clip share: one unit per block of an expert, from that block's weights, activations and factors.

    artifacts/<stage>/<expert>/manifest.json            {"blocks": {block: digest}, ...}
    artifacts/<stage>/<expert>/<block>/factors.safetensors
    artifacts/<stage>/<expert>/<block>/record.json      what was chosen, per site
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stages import artifacts
from stages.common import Stage, read_json, to_json
from stages.expert import check_expert, open_expert
from stepquant.calibration.activations import Activations, block_name, read_activations, site_folder
from stepquant.compute.progress import meter
from stepquant.compute.task import Task
from stepquant.compute.units import gather
from stepquant.errors import UserError
from stepquant.formats import Scales, check_groups, get_format, unpack_nibbles
from stepquant.models.denoiser import Denoiser
from stepquant.models.sites import WAN_SITES, Site
from stepquant.models.source import expert_digest
from stepquant.params import Compute
from stepquant.quantize.layer import LayerFactors, Precision
from stepquant.quantize.rotate import check_rotation
from stepquant.quantize.transform import InputTransform

Factors = dict[str, torch.Tensor]
Record = dict[str, Any]
SiteWork = Callable[["Block", Site], tuple[Factors, Record]]


@dataclass(frozen=True)
class Block:
    """One block as a stage sees it; everything is read when asked for, one site at a time."""

    index: int
    model: Denoiser
    folders: dict[str, Path]

    def weight(self, site: Site) -> torch.Tensor:
        """The stacked weight [N, K] of a site's linears, float32."""
        return torch.cat([self.model.linear_weight(self.index, linear) for linear in site.linears])

    def activations(self, site: Site) -> Activations:
        return read_activations(site_folder(self.folders["activations"], self.index, site.name), self.model.device)

    def factor(self, stage: str, name: str) -> torch.Tensor:
        return read_factor(self.folders[stage], self.index, name, self.model.device)


def read_factor(folder: Path, index: int, name: str, device: str) -> torch.Tensor:
    """One tensor of a block's factors. Raises UserError if their file is missing or damaged."""
    path = folder / block_name(index) / "factors.safetensors"
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return file.get_tensor(name)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); remove {folder} and run its stage again") from None


@dataclass(frozen=True)
class BlockWork:
    """The work of one unit: every site of one block. Any process that shares the artifacts can do it."""

    index: int
    expert: str
    manifest: dict[str, Any]
    compute: Compute
    sources: dict[str, Path]
    work: SiteWork

    def __call__(self, folder: Path) -> None:
        block = Block(self.index, open_expert(self.manifest, self.expert, self.compute), self.sources)
        results = {site.name: self.work(block, site) for site in WAN_SITES}
        tensors = {f"{name}.{key}": t.cpu().contiguous() for name, (factors, _) in results.items() for key, t in factors.items()}
        save_file(tensors, folder / "factors.safetensors")
        (folder / "record.json").write_text(to_json({name: record for name, (_, record) in results.items()}))


def run_blocks(stage: Stage, expert: str, sources: dict[str, Path], out: Path, work: SiteWork, **extra: Any) -> None:
    """Do `work` for every site of every block of an expert, and gather the blocks into `out`.

    sources: the artifacts this stage reads, by name; each has a manifest.json with its blocks' digests. work: it may run
    in another process, so it is a function of a module or a partial of one. extra: what else the manifest shall say.
    """
    manifest = read_json(artifacts.MODEL)
    check_expert(manifest, expert)
    digests = {name: read_json(folder / "manifest.json")["blocks"] for name, folder in sources.items()}
    tasks = {}
    for index in range(manifest["experts"][expert]["blocks"]):
        name = block_name(index)
        key = stage.key(block=index, model=expert_digest(manifest, expert), **{source: found[name] for source, found in digests.items()})
        tasks[name] = Task(key, BlockWork(index, expert, manifest, stage["compute"], sources, work))
    with stage.executor() as executor, meter(f"{stage.name}@{expert}", len(tasks)) as progress:
        units = dict(zip(tasks, executor.map_units(stage.units, list(tasks.values()), progress)))
    gather(units, out, {"manifest.json": to_json({"blocks": {name: unit.digest for name, unit in units.items()}} | extra)})


def check_shapes(manifest: dict[str, Any], expert: str, formats: Any, rank: int, rotations: Sequence[int] = ()) -> None:
    """Refuse, before any work, a format or rotation that does not divide a site's channels, or a rank larger than its weight."""
    for name, site in manifest["experts"][expert]["sites"].items():
        where = f"{expert} {name}"
        rows = sum(shape[0] for shape in site["linears"].values())
        columns = next(iter(site["linears"].values()))[1]
        for kind in ("weight", "activation"):
            check_groups(columns, get_format(getattr(formats, kind)), f"format.{kind}, {where}")
        for rotation in rotations:
            check_rotation(rotation, columns, f"rotate.blocks, {where}")
        if rank > min(rows, columns):
            raise UserError(f"lowrank.rank: {rank} for {where}, a weight of {rows} x {columns}; allowed: 0 to {min(rows, columns)}")


def precision_of(formats: Any) -> Precision:
    """The formats section as the numerics take it."""
    return Precision(get_format(formats.weight), formats.e8m0_weight, get_format(formats.activation), formats.e8m0_activation)


def site_transform(block: Block, site: Site) -> InputTransform:
    """What stage lowrank chose to do to the site's input."""
    smooth, mean, rotation = (block.factor("lowrank", f"{site.name}.{name}") for name in ("smooth", "mean", "rotation"))
    return InputTransform(smooth, mean, int(rotation))


def site_branch(block: Block, site: Site, stage: str) -> tuple[torch.Tensor, torch.Tensor]:
    """proj_down [K, R] and proj_up [N, R]: as stage "lowrank" factored it, or as refitted to the codes of "residual"."""
    return block.factor(stage, f"{site.name}.proj_down"), block.factor(stage, f"{site.name}.proj_up")


def site_layer(block: Block, site: Site, precision: Precision) -> LayerFactors:
    """The site's final weights as the numerics take them."""
    transform, branch = site_transform(block, site), site_branch(block, site, "residual")
    codes = unpack_nibbles(block.factor("residual", f"{site.name}.codes"))
    tensor = block.factor("residual", f"{site.name}.tensor_scale") if precision.weight.name == "nvfp4" else None
    scales = Scales(block.factor("residual", f"{site.name}.scales"), tensor)
    return LayerFactors(codes, scales, transform, *branch, block.factor("residual", f"{site.name}.offset"), precision)
