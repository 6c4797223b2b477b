"""Writes a checkpoint of the target `comfyui_w4a8` as ComfyUI reads it: one safetensors file per expert.

    OUT/<OUT's name>_<expert>.safetensors    for ComfyUI's folder models/diffusion_models
    OUT/export.json                          what is in each file, and what the workflow has to set

Names are Wan-Video's own. Each quantized linear y = x W^T + b with W [N, K] has, beside its bias,

    NAME.weight             int8  [N, K/2]    4-bit codes, the even column in the low nibble
    NAME.weight_s_rel       e4m3  [N, K/16]   group scales
    NAME.weight_s_channel   fp32  [N]         row scales
    NAME.weight_codebook    fp32  [16]        the levels of the codes; without it ComfyUI takes code - 8

and its entry in the file's metadata, "_quantization_metadata": {"layers": {NAME: {"format": "asym_w4a8_int8", ...}}}.
All other tensors are those of the checkpoint, in its dtypes. Source: ComfyUI's comfy/ops.py and comfy/utils.py
(asym_w4a8_int8, since pull request 15308), and comfy-kitchen 0.2.40, tensor/w4a8_int8.py.

It is an exact re-layout: whatever the file could not carry is refused, since the checkpoint was solved with it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepquant.checkpoint.linears import read_settings
from stepquant.checkpoint.scheduler import SHIFTS
from stepquant.errors import InvalidInput, UserError
from stepquant.formats.asym_w4a8 import CODEBOOK
from stepquant.models.configs import read_config
from stepquant.models.families import find_family
from stepquant.models.families.description import ExpertRange
from stepquant.models.native_names import native_key, native_module
from stepquant.models.weights import Weights, open_weights
from stepquant.runtime.layout import QuantizationSettings
from stepquant.storage.atomic import finished_folder_or_absent, sync, sync_tree
from stepquant.storage.digests import file_digest
from stepquant.storage.safetensors_stream import TensorSource, stream_safetensors
from stepquant.targets import TARGETS

TARGET = TARGETS["comfyui_w4a8"]
GROUP, ROTATION = 16, 256
LAYER = {"format": "asym_w4a8_int8", "group_size": GROUP, "convrot_groupsize": ROTATION}


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export.

    Attributes:
        name: Its name.
        expert: Name of the expert that it holds.
        linears: Native names of the quantized linears.
        tensors: What is written, by native name.
    """

    name: str
    expert: str
    linears: tuple[str, ...]
    tensors: dict[str, TensorSource]

    @property
    def nbytes(self) -> int:
        """Bytes of all values; the header adds about 0.2 MB at 400 linears."""
        return sum(source.nbytes for source in self.tensors.values())


def plan_export(checkpoint: Path, out: Path) -> list[ExportedFile]:
    """The files of an export, from configs and headers, and the small tensors that have to be neutral.

    Args:
        checkpoint: Pipeline folder that stage pack wrote.
        out: The folder that will be written.

    Raises:
        UserError: The checkpoint is damaged, is not quantized, or holds something that the files cannot carry.
    """
    index = read_config(checkpoint / "model_index.json")
    return [
        _expert_file(checkpoint / expert.subfolder, f"{out.name}_{expert.name}.safetensors", expert)
        for expert in find_family(index.get("_class_name")).experts(index)
    ]


def export_comfyui(checkpoint: Path, out: Path, files: list[ExportedFile]) -> None:
    """Write the files of `plan_export` into a new folder, one tensor in memory at a time.

    Raises:
        InvalidInput: `out` exists.
    """
    if out.exists():
        raise InvalidInput(f"{out}: exists; remove it first, or name another folder")
    contents = {}
    with finished_folder_or_absent(out) as work:
        for file in files:
            layers = {"layers": dict.fromkeys(file.linears, LAYER)}
            metadata = {"_quantization_metadata": json.dumps(layers), "format": "pt"}
            stream_safetensors(work / file.name, file.tensors, metadata)
            digest = file_digest(work / file.name)
            contents[file.name] = {"expert": file.expert, "linears": len(file.linears), "sha256": digest}
        record = {"target": TARGET.name, "files": contents, "workflow": _workflow(checkpoint)}
        (work / "export.json").write_text(json.dumps(record, indent=2) + "\n")
        sync_tree(work)
    sync(out.parent)


def _workflow(checkpoint: Path) -> dict[str, Any]:
    """What the files do not say and the workflow has to set: the timestep shift, and where the second expert starts."""
    scheduler = read_config(checkpoint / "scheduler" / "scheduler_config.json")
    shift = next((scheduler[key] for key in SHIFTS if key in scheduler), None)
    return {"shift": shift, "boundary": read_config(checkpoint / "model_index.json").get("boundary_ratio")}


def _expert_file(folder: Path, name: str, expert: ExpertRange) -> ExportedFile:
    settings, weights = read_settings(folder), open_weights(folder)
    for found, carried in _uncarried(settings):
        raise UserError(
            f"{folder}: {found}; {TARGET.program} {carried}. Set target.program: {TARGET.name} "
            f"(`stepquant profile {TARGET.name}` writes the recipe), and run the pipeline again"
        )
    tensors: dict[str, TensorSource] = {}
    linears, stored = [], set()
    for target in settings.targets:
        native = native_module(target)
        if native is None:
            raise UserError(f"{folder}: {target} has no name in ComfyUI's Wan models; it cannot be written")
        _check_neutral(folder, weights, target)
        linears.append(native)
        tensors |= {f"{native}.{leaf}": source for leaf, source in _linear(weights, target)}
        stored |= {key for key in _keys(target) if key in weights}
    for key in weights:
        if key not in stored:
            if (native := native_key(key)) is None:
                raise UserError(f"{folder}: {key} has no name in ComfyUI's Wan models; it cannot be written")
            tensors[native] = TensorSource(weights.shape(key), weights.dtype(key), partial(weights.get, key))
    return ExportedFile(name, expert.name, tuple(linears), tensors)


def _uncarried(settings: QuantizationSettings) -> Iterator[tuple[str, str]]:
    """What the settings of a checkpoint have that the files cannot carry, and what they carry instead."""
    formats = (settings.weight_format, settings.activation_format)
    if formats not in (TARGET.formats or ()):
        yield f"its formats are {formats[0]} with {formats[1]}", "computes asym_w4a8 with int8_row"
    if settings.rank:
        yield f"it has a low-rank branch of rank {settings.rank}", "has none"
    if settings.mean_subtraction:
        yield "it subtracts means", "subtracts none"
    if settings.hadamard != TARGET.hadamard:
        yield f"its rotations are of the kind {settings.hadamard}", f"rotates by the kind {TARGET.hadamard}"
    for target in settings.targets:
        if (size := settings.rotations.get(target, 0)) != ROTATION:
            yield f"{target} is rotated in groups of {size} channels", f"rotates groups of {ROTATION}"


def _check_neutral(folder: Path, weights: Weights, target: str) -> None:
    """Refuse smoothing factors and clips other than 1."""
    for name, what in (("smooth_factor", "smoothing"), ("clip_ratio", "clips")):
        if not (weights.get(f"{target}.{name}") == 1).all():
            raise UserError(
                f"{folder}: {target}.{name} is not 1 everywhere; {TARGET.program} has no {what}. Use a checkpoint that "
                f"was made with target.program: {TARGET.name}"
            )


def _keys(target: str) -> list[str]:
    """The tensors of a linear that the file holds under other names, or that are neutral."""
    return [f"{target}.{name}" for name in ("qweight", "wscales", "wcscales", "smooth_factor", "clip_ratio")]


def _linear(weights: Weights, target: str) -> Iterator[tuple[str, TensorSource]]:
    """The tensors of a quantized linear but its bias, by the name after the linear's."""
    N, half = weights.shape(f"{target}.qweight")
    group = partial(_transposed, weights, f"{target}.wscales")
    yield "weight", TensorSource((N, half), torch.int8, partial(weights.get, f"{target}.qweight"))
    yield "weight_s_rel", TensorSource((N, 2 * half // GROUP), torch.float8_e4m3fn, group)
    yield "weight_s_channel", TensorSource((N,), torch.float32, partial(weights.get, f"{target}.wcscales"))
    yield "weight_codebook", TensorSource((len(CODEBOOK),), torch.float32, partial(torch.tensor, CODEBOOK))


def _transposed(weights: Weights, key: str) -> Tensor:
    return weights.get(key).T
