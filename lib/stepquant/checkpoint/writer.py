"""Writes quantized checkpoints in the layout of stepquant.runtime.layout, with one block in memory at a time.

Equal input gives equal bytes: keys are sorted, and each safetensors file has one metadata key, because safetensors
writes several keys in random order. A folder gets its name only after all of it is on disk.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stepquant.checkpoint.packed import PackedLinear
from stepquant.checkpoint.rest import stored_dtype
from stepquant.checkpoint.scheduler import with_flow_shift
from stepquant.errors import InvalidInput, MissingFile, UnsupportedCheckpoint, UserError
from stepquant.models.configs import read_config
from stepquant.models.families import find_denoiser
from stepquant.models.weights import PICKLE_SUFFIXES, Weights, open_weights
from stepquant.runtime.layout import QuantizationSettings
from stepquant.storage.atomic import finished_folder_or_absent, sync, sync_tree

STEM = "diffusion_pytorch_model"

Blocks = Iterable[tuple[int, dict[str, PackedLinear]]]
Expert = tuple[QuantizationSettings, Blocks] | tuple[QuantizationSettings, Blocks, Weights]


def write_checkpoint(
    source: Path,
    out: Path,
    experts: Mapping[str, Expert],
    *,
    dtype: torch.dtype,
    flow_shift: float,
) -> None:
    """Write a complete diffusers pipeline folder: the given experts quantized, all other components copied.

    Components are copied, not linked, so that a file that is later rewritten in the source cannot change a checkpoint.
    The scheduler gets the timestep shift that the experts were calibrated with.

    Args:
        source: pipeline folder with a model_index.json.
        out: the folder to write; it must not exist.
        experts: settings, blocks and, if not the source's own, weights, as in `write_expert`, by subfolder, such as
            `transformer_2`.
        dtype: as in `write_expert`.
        flow_shift: the timestep shift.

    Raises:
        MissingFile: if the source is no pipeline folder, or lacks a component.
        UnsupportedCheckpoint: if a component has pickled weights only.
        InvalidInput: if the scheduler has no timestep shift.
        UserError: if `out` exists, or as `write_expert`.
    """
    source, out = Path(source), Path(out)
    index = read_config(source / "model_index.json")
    shifted = source / "scheduler" / "scheduler_config.json"
    scheduler = with_flow_shift(read_config(shifted), flow_shift)
    components = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    if unknown := sorted(set(experts) - set(components)):
        raise InvalidInput(f"{source}: the pipeline has no component {unknown[0]!r}; it has {', '.join(components)}")
    _refuse_existing(out)
    with finished_folder_or_absent(out) as work:
        shutil.copyfile(source / "model_index.json", work / "model_index.json")
        for name in components:
            if name in experts:
                write_expert(source / name, work / name, *experts[name], dtype=dtype)
            else:
                _copy_component(source / name, work / name)
        _write_json(work / shifted.relative_to(source), scheduler)
        sync_tree(work)
    sync(out.parent)


def write_expert(
    source: Path,
    out: Path,
    settings: QuantizationSettings,
    blocks: Blocks,
    weights: Weights | None = None,
    *,
    dtype: torch.dtype,
) -> None:
    """Write the folder of one quantized denoiser.

    Args:
        source: the unquantized folder: config.json, and safetensors in one file or in shards.
        out: the folder to write; it must not exist.
        settings: what config.json will say.
        blocks: pairs of block index and packed linears by module path, consumed one at a time. Together they have every
            target of the settings once.
        weights: whose tensors that are not quantized are written, such as weights with LoRAs; None for those of the
            source.
        dtype: dtype of the arithmetic with which the expert was calibrated; no other tensor is stored in a wider one
            than the expert computes with (`stored_dtype`).

    Raises:
        UserError: if the source is missing, broken, already quantized or of an unknown class, or if `out` exists.
        ValueError: if blocks and settings disagree.
    """
    source, out = Path(source), Path(out)
    config = read_config(source / "config.json")
    if "quantization_config" in config:
        raise InvalidInput(f"{source}: is already quantized; expected an unquantized model")
    weights = open_weights(source) if weights is None else weights
    for target in settings.targets:
        weights.info(f"{target}.weight")
    denoiser = find_denoiser(config.get("_class_name"))
    _refuse_existing(out)
    with finished_folder_or_absent(out) as work:
        shards = []
        for index, block in blocks:
            shards.append(_save(work, f"block-{index:05d}", _block_tensors(block, settings, weights)))
            del block  # before the next one is made
        codes = [key for shard in shards for key in shard.sizes if key.endswith(".qweight")]
        found = sorted(key.removesuffix(".qweight") for key in codes)
        if found != sorted(settings.targets):
            targets = len(settings.targets)
            raise ValueError(
                f"the blocks have {len(found)} linears; they must be the {targets} targets of the settings"
            )
        replaced = {f"{target}.weight" for target in settings.targets}.union(*(shard.sizes for shard in shards))
        biases = {f"{target}.bias" for target in settings.targets}
        rest = {}
        for key in weights:
            if key not in replaced:
                stored = stored_dtype(key, weights.dtype(key), dtype, denoiser)
                rest[key] = weights.get(key).to(torch.float32 if key in biases else stored)
        shards.append(_save(work, "rest", rest))
        _write_index(work, shards)
        _write_json(work / "config.json", config | {"quantization_config": settings.to_config()})
        sync_tree(work)


@dataclass(frozen=True)
class _Shard:
    """A written shard: its file under a temporary name, and the bytes of each tensor in it."""

    file: Path
    sizes: dict[str, int]


def _block_tensors(
    block: dict[str, PackedLinear], settings: QuantizationSettings, weights: Weights
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for target, packed in block.items():
        packed.check(settings, *weights.shape(f"{target}.weight"))
        tensors |= {f"{target}.{name}": tensor for name, tensor in packed.tensors().items()}
    return tensors


def _save(work: Path, name: str, tensors: dict[str, Tensor]) -> _Shard:
    file = work / f"{name}.safetensors"
    # Cloned, because safetensors refuses tensors that share memory: to_q, to_k and to_v have the same smooth_factor.
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return _Shard(file, {key: tensor.nbytes for key, tensor in tensors.items()})


def _write_index(work: Path, shards: list[_Shard]) -> None:
    """Rename the shards to the names that diffusers uses, ordered by block, and write the index."""
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(sorted(shards, key=lambda shard: shard.file.name), start=1):
        name = f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors"
        shard.file.rename(work / name)
        weight_map |= dict.fromkeys(shard.sizes, name)
    total = sum(size for shard in shards for size in shard.sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(work / f"{STEM}.safetensors.index.json", index)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _copy_component(source: Path, out: Path) -> None:
    """Copy a component without its pickled weights; refuse one that has no other weights."""
    if not source.is_dir():
        raise MissingFile(f"{source}: no such folder, but model_index.json names this component")
    pickles = sorted(file.name for file in source.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles and not any(source.glob("*.safetensors")):
        raise UnsupportedCheckpoint(f"{source}: found only pickled weights ({pickles[0]}); convert them to safetensors")
    shutil.copytree(source, out, copy_function=shutil.copyfile, ignore=lambda _, names: set(names) & set(pickles))


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists; remove it first")
