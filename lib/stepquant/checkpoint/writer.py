"""Writes quantized checkpoints in the layout of stepquant.runtime.layout, one block in memory at a time.

Same input, same bytes: keys are sorted, and each safetensors file has one metadata key, since safetensors writes
several in random order. A folder appears under its name when all of it is on disk, or not at all.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from stepquant.checkpoint.packed import PackedLinear
from stepquant.errors import UserError
from stepquant.models.weights import PICKLE_SUFFIXES, Weights, open_weights
from stepquant.runtime.layout import QuantizationSettings

STEM = "diffusion_pytorch_model"

Blocks = Iterable[tuple[int, dict[str, PackedLinear]]]


def write_checkpoint(source: Path, out: Path, experts: dict[str, tuple[QuantizationSettings, Blocks]]) -> None:
    """Writes a complete diffusers pipeline folder: the named experts quantized, all other components copied.

    source: pipeline folder with model_index.json. out: must not exist. experts: subfolder, such as `transformer_2`, ->
    settings and blocks as in write_expert. Components are copied, not linked: a file rewritten in place in the source
    must not change a finished checkpoint. Raises UserError if the source is no pipeline, lacks a component, or has a
    component with pickled weights only, or if out exists.
    """
    source, out = Path(source), Path(out)
    index = _read_json(source / "model_index.json", "a diffusers pipeline folder")
    components = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    if unknown := sorted(set(experts) - set(components)):
        raise UserError(f"{source}: the pipeline has no component {unknown[0]!r}; it has {', '.join(components)}")
    with _whole_or_absent(out) as work:
        shutil.copyfile(source / "model_index.json", work / "model_index.json")
        for name in components:
            if name in experts:
                write_expert(source / name, work / name, *experts[name])
            else:
                _copy_component(source / name, work / name)


def write_expert(source: Path, out: Path, settings: QuantizationSettings, blocks: Blocks) -> None:
    """Writes the folder of one quantized denoiser.

    source: its unquantized folder (config.json and safetensors, single or sharded). out: must not exist.
    blocks: (block index, {target module path: PackedLinear}), consumed one at a time; together they hold every target
    of settings once. Raises UserError if the source is missing, broken or quantized already, or if out exists;
    ValueError if blocks and settings disagree.
    """
    source, out = Path(source), Path(out)
    config = _read_json(source / "config.json", "the folder of a diffusers model")
    if "quantization_config" in config:
        raise UserError(f"{source}: is quantized already; expected an unquantized model")
    weights = open_weights(source)
    for target in settings.targets:
        weights.info(f"{target}.weight")
    with _whole_or_absent(out) as work:
        shards = []
        for index, block in blocks:
            shards.append(_save(work, f"block-{index:05d}", _block_tensors(block, settings, weights)))
            del block  # before the next one is made
        codes = [key for shard in shards for key in shard.sizes if key.endswith(".qweight")]
        found = sorted(key.removesuffix(".qweight") for key in codes)
        if found != sorted(settings.targets):
            targets = len(settings.targets)
            raise ValueError(
                f"the blocks hold {len(found)} linears; they must be the {targets} targets of the settings"
            )
        replaced = {f"{target}.weight" for target in settings.targets}.union(*(shard.sizes for shard in shards))
        shards.append(_save(work, "rest", {key: weights.get(key) for key in weights if key not in replaced}))
        _write_index(work, shards)
        _write_json(work / "config.json", config | {"quantization_config": settings.to_config()})


@dataclass(frozen=True)
class _Shard:
    """A written shard: its provisional file and the bytes of each tensor in it."""

    file: Path
    sizes: dict[str, int]


def _block_tensors(
    block: dict[str, PackedLinear], settings: QuantizationSettings, weights: Weights
) -> dict[str, Tensor]:
    tensors = {}
    for target, packed in block.items():
        packed.check(settings, *weights.shape(f"{target}.weight"))
        tensors |= {f"{target}.{name}": tensor for name, tensor in packed.tensors().items()}
    return tensors


def _save(work: Path, name: str, tensors: dict[str, Tensor]) -> _Shard:
    file = work / f"{name}.safetensors"
    # Cloned, because safetensors refuses tensors that share memory, as to_q, to_k and to_v do with what they share.
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    return _Shard(file, {key: tensor.nbytes for key, tensor in tensors.items()})


def _write_index(work: Path, shards: list[_Shard]) -> None:
    """Gives the shards the names diffusers uses, in the order of their blocks however they came, and writes the index."""
    weight_map = {}
    for i, shard in enumerate(sorted(shards, key=lambda shard: shard.file.name), start=1):
        name = f"{STEM}-{i:05d}-of-{len(shards):05d}.safetensors"
        shard.file.rename(work / name)
        weight_map |= dict.fromkeys(shard.sizes, name)
    total = sum(size for shard in shards for size in shard.sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(work / f"{STEM}.safetensors.index.json", index)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _read_json(file: Path, expected: str) -> dict:
    if not file.is_file():
        raise UserError(f"{file.parent}: no {file.name}; expected {expected}")
    try:
        return json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file}: not JSON ({e})") from e


def _copy_component(source: Path, out: Path) -> None:
    """Copies a component without pickled weights; refuses one that has no others."""
    if not source.is_dir():
        raise UserError(f"{source}: no such folder, but model_index.json names this component")
    pickles = sorted(file.name for file in source.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles and not any(source.glob("*.safetensors")):
        raise UserError(f"{source}: found only pickled weights ({pickles[0]}); convert them to safetensors")
    shutil.copytree(source, out, copy_function=shutil.copyfile, ignore=lambda _, names: set(names) & set(pickles))


@contextmanager
def _whole_or_absent(out: Path) -> Iterator[Path]:
    """A work folder beside out that becomes out, all of it on disk, when the block ends well; else it is removed."""
    if out.exists():
        raise UserError(f"{out}: exists; remove it first")
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # what a killed run left
    work.mkdir(parents=True)
    try:
        yield work
        for path in (*work.rglob("*"), work):
            _sync(path)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
