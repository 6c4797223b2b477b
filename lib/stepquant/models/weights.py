"""Lazy reading of a component's weights: one safetensors file, or shards with an index.

Headers are read and checked when a folder is opened; a tensor's bytes are read (memory-mapped) when it is asked for,
so that a 28 GB expert can be walked one block at a time. Pickled weights are refused: loading one runs its code.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from stepquant.errors import UserError

# What diffusers and transformers call a component's weights; the first that exists is read.
STEMS = ("diffusion_pytorch_model", "model")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# A header longer than this is a broken length field, not a header (the safetensors library has the same limit).
MAX_HEADER_BYTES = 100_000_000

# The dtype names of the safetensors format.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, known without reading its bytes."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Weights:
    """The tensors of one component by key. Made by open_weights; keys are sorted."""

    def __init__(self, folder: Path, infos: dict[str, TensorInfo]):
        self.folder = folder
        self._infos = dict(sorted(infos.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, key: str) -> bool:
        return key in self._infos

    def info(self, key: str) -> TensorInfo:
        """Shape, dtype and file of a tensor. Raises UserError if there is no such key."""
        if key not in self._infos:
            raise UserError(f"{self.folder}: no tensor named {key!r} among its {len(self)} tensors")
        return self._infos[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.info(key).shape

    def dtype(self, key: str) -> torch.dtype:
        return self.info(key).dtype

    def get(self, key: str) -> torch.Tensor:
        """The tensor on the CPU, exactly as stored. Raises UserError if there is no such key.

        The file is mapped anew each time: the pages of a mapping that lives on stay resident, block after block.
        """
        with safe_open(self.info(key).file, framework="pt", device="cpu") as file:
            return file.get_tensor(key)


def open_weights(folder: Path) -> Weights:
    """Opens the weights of a component folder, such as `transformer`.

    Raises UserError if the weights are missing, truncated or pickled, or if the index and the shards disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a folder with safetensors weights")
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return Weights(folder, _read_sharded(index))
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return Weights(folder, read_header(single))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UserError(
            f"{folder}: found only pickled weights ({pickles[0]}), which can run code; convert them to safetensors"
        )
    names = " or ".join(f"{stem}.safetensors[.index.json]" for stem in STEMS)
    raise UserError(f"{folder}: no weights; expected {names}")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file. Raises UserError if the file is truncated or no safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= MAX_HEADER_BYTES:
            raise UserError(f"{file}: not a safetensors file, or a truncated one ({size} bytes)")
        raw = f.read(length)
    if len(raw) < length:
        raise UserError(
            f"{file}: truncated: {size} bytes, its header alone needs {8 + length}; copy or download it again"
        )
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        infos = {key: _tensor_info(file, key, entry) for key, entry in header.items()}
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
        raise UserError(f"{file}: not a safetensors file: its header cannot be read ({e})") from e
    if size != needed:
        raise UserError(
            f"{file}: truncated or damaged: {size} bytes, its header says {needed}; copy or download it again"
        )
    return infos


def _tensor_info(file: Path, key: str, entry: dict) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{file}: tensor {key!r} has dtype {entry['dtype']}; allowed: {', '.join(DTYPES)}")
    return TensorInfo(file, tuple(entry["shape"]), DTYPES[entry["dtype"]])


def _read_sharded(index: Path) -> dict[str, TensorInfo]:
    """All tensors of the shards an index names, after checking that index and shards hold the same keys."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{index}: not a safetensors index: expected JSON with a weight_map ({e})") from e
    infos = {}
    for name in shards:
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{index}: names the shard {name!r}, which is no file in {index.parent}")
        shard = read_header(file)
        if unlisted := sorted(key for key in shard if weight_map.get(key) != name):
            raise UserError(f"{file}: holds tensor {unlisted[0]!r}, which {index.name} does not list there")
        infos.update(shard)
    if absent := sorted(set(weight_map) - set(infos)):
        raise UserError(f"{index}: lists tensor {absent[0]!r} in {weight_map[absent[0]]}, which does not hold it")
    return infos
