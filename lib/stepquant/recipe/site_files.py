"""The files of a block's sites: what each part of the recipe stores, written, read and predicted from one definition.

    <out>/<block>/factors.safetensors    "<site>.<name>" for every tensor of the records below
    <out>/<block>/record.json            what was selected, per site

The records are those of the stages lowrank (TransformFactors), gptq (ResidualFactors) and clip (ClipTable). `tensors`
gives what is written, `from_file` reads it back, and `shapes` says what will be written before anything ran.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepquant.errors import DamagedFile, MissingFile
from stepquant.formats import Format, Scales, pack_nibbles, unpack_nibbles
from stepquant.quantize.lowrank import Branch
from stepquant.quantize.quantized_layer import QuantizedLayer, QuantScheme
from stepquant.quantize.rotate import REGULAR, SYLVESTER
from stepquant.quantize.transform import InputTransform

FACTORS, RECORD = "factors.safetensors", "record.json"

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor, by its name


class SiteRecord(Protocol):
    """What a part of the recipe stores of one site."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write, by name."""
        ...


@dataclass(frozen=True)
class TransformFactors:
    """A site's input transform and first low-rank branch.

    Attributes:
        mean: bfloat16 [K].
        smooth: bfloat16 [K].
        rotation: Hadamard size; 0 is no rotation.
        hadamard: Kind of the Hadamard matrix. The tensor "rotation" has the size, and 1 if the kind is regular.
        proj_down: bfloat16 [K, R].
        proj_up: bfloat16 [N, R].
    """

    mean: Tensor
    smooth: Tensor
    rotation: int
    hadamard: str
    proj_down: Tensor
    proj_up: Tensor

    @property
    def transform(self) -> InputTransform:
        """The input transform."""
        return InputTransform(self.smooth, self.mean, self.rotation, self.hadamard)

    @property
    def branch(self) -> Branch:
        """The low-rank branch."""
        return self.proj_down, self.proj_up

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write, by name."""
        return {
            "mean": self.mean,
            "smooth": self.smooth,
            "rotation": torch.tensor([self.rotation, self.hadamard == REGULAR], dtype=torch.int64),
            "proj_down": self.proj_down,
            "proj_up": self.proj_up,
        }

    @classmethod
    def from_file(cls, folder: Path, site: str, device: str) -> Self:
        """Reads a site's factors from its block's folder. Raises MissingFile or DamagedFile."""
        found = _read(folder, site, ["mean", "smooth", "rotation", "proj_down", "proj_up"], device)
        size, regular = found["rotation"].tolist()  # one copy to the host
        kind, branch = REGULAR if regular else SYLVESTER, (found["proj_down"], found["proj_up"])
        return cls(found["mean"], found["smooth"], size, kind, *branch)

    @classmethod
    def shapes(cls, N: int, K: int, rank: int) -> Shapes:
        """Shapes and dtypes of `tensors` for N outputs, K inputs and a rank."""
        vector = ((K,), torch.bfloat16)
        return {"mean": vector, "smooth": vector, "rotation": ((2,), torch.int64)} | _branch_shapes(N, K, rank)


@dataclass(frozen=True)
class ResidualFactors:
    """A site's rounded residual and the low-rank branch that belongs to it.

    Attributes:
        codes: uint8 [N, K/2], two codes per byte.
        scales: [N, K/g] in the format's dtype.
        tensor_scale: float32 [] (nvfp4), None in the other formats.
        row_scale: float32 [N] (asym_w4a8), None in the other formats.
        proj_down: bfloat16 [K, R].
        proj_up: bfloat16 [N, R].
        offset: The mean's contribution to the output, float32 [N].
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    row_scale: Tensor | None
    proj_down: Tensor
    proj_up: Tensor
    offset: Tensor

    @classmethod
    def of_layer(cls, layer: QuantizedLayer) -> Self:
        """The record of a quantized layer; its transform is in the site's TransformFactors."""
        scales, branch = layer.scales, (layer.proj_down, layer.proj_up)
        return cls(pack_nibbles(layer.codes), scales.group, scales.tensor, scales.row, *branch, layer.offset)

    def layer(self, transform: InputTransform, scheme: QuantScheme) -> QuantizedLayer:
        """The quantized layer under the site's transform and the formats it was rounded in."""
        scales, codes = Scales(self.scales, self.tensor_scale, self.row_scale), unpack_nibbles(self.codes)
        return QuantizedLayer(codes, scales, transform, self.proj_down, self.proj_up, self.offset, scheme)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write, by name."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in found if tensor is not None}

    @classmethod
    def from_file(cls, folder: Path, site: str, device: str) -> Self:
        """Reads a site's factors from its block's folder. Raises MissingFile or DamagedFile."""
        optional = ("tensor_scale", "row_scale")
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = dict.fromkeys(optional) | _read(folder, site, names, device, optional)
        return cls(**values)

    @classmethod
    def shapes(cls, N: int, K: int, rank: int, fmt: Format) -> Shapes:
        """Shapes and dtypes of `tensors` for N outputs, K inputs, a rank and a weight format."""
        shapes: Shapes = {
            "codes": ((N, K // 2), torch.uint8),
            "scales": ((N, K // fmt.group), fmt.scale_dtype),
            "offset": ((N,), torch.float32),
        }
        if fmt.has_tensor_scale:
            shapes["tensor_scale"] = ((), torch.float32)
        if fmt.has_row_scale:
            shapes["row_scale"] = ((N,), torch.float32)
        return shapes | _branch_shapes(N, K, rank)


@dataclass(frozen=True)
class ClipTable:
    """A site's clips, all [bins].

    Attributes:
        ratio: The best ratio of each bin, float32.
        exponent: The best E8M0 exponent offset of each bin, int8.
        single_ratio: The best single ratio, repeated, float32.
        single_exponent: The best single exponent offset, repeated, int8.
    """

    ratio: Tensor
    exponent: Tensor
    single_ratio: Tensor
    single_exponent: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_file(cls, folder: Path, site: str, device: str) -> Self:
        """Reads a site's clips from its block's folder. Raises MissingFile or DamagedFile."""
        return cls(**_read(folder, site, [field.name for field in fields(cls)], device))

    @classmethod
    def shapes(cls, bins: int) -> Shapes:
        """Shapes and dtypes of `tensors` for a site with this many bins."""
        ratio, exponent = ((bins,), torch.float32), ((bins,), torch.int8)
        return {"ratio": ratio, "exponent": exponent, "single_ratio": ratio, "single_exponent": exponent}


def block_tensors(sites: Mapping[str, SiteRecord]) -> dict[str, Tensor]:
    """The content of a block's factors.safetensors, on the CPU, from the records of its sites by site name."""
    return {
        f"{site}.{name}": tensor.cpu().contiguous()
        for site, record in sites.items()
        for name, tensor in record.tensors().items()
    }


def _branch_shapes(N: int, K: int, rank: int) -> Shapes:
    return {"proj_down": ((K, rank), torch.bfloat16), "proj_up": ((N, rank), torch.bfloat16)}


def _read(folder: Path, site: str, names: list[str], device: str, optional: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Tensors of a site from its block's folder, on a device."""
    path = folder / FACTORS
    try:
        with safe_open(path, framework="pt", device=device) as file:
            existing = set(file.keys())
            wanted = [name for name in names if name not in optional or f"{site}.{name}" in existing]
            return {name: file.get_tensor(f"{site}.{name}") for name in wanted}
    except (FileNotFoundError, SafetensorError) as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else DamagedFile
        raise kind(f"{path}: missing or damaged ({error}); remove {folder.parent} and run its stage again") from None
