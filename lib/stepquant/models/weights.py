"""Lazy reading of a component's weights: one safetensors file, or shards with an index.

Opening a folder reads and checks the headers only. A tensor is memory-mapped when it is requested, so a 28 GB expert
can be read one block at a time. Pickled weights are refused, because loading them runs code.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from stepquant.errors import DamagedFile, InvalidInput, MissingFile, UnsupportedCheckpoint

# File names of weights in diffusers and transformers, without suffix; the first that exists is read.
STEMS = ("diffusion_pytorch_model", "model")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# A longer header means a broken length field. The safetensors library has the same limit.
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
    """File, shape, dtype and first byte of a tensor, from the header of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's values in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Weights:
    """The tensors of one component by key, in sorted order. `open_weights` creates it."""

    def __init__(self, folder: Path, infos: dict[str, TensorInfo]):
        self.folder = folder
        self._infos = dict(sorted(infos.items()))

    @property
    def changed(self) -> tuple[str, ...]:
        """Keys of tensors that are not read as they are stored; FusedWeights has some."""
        return ()

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, key: str) -> bool:
        return key in self._infos

    def info(self, key: str) -> TensorInfo:
        """File, shape and dtype of a tensor. Raises DamagedFile if there is no such key."""
        if key not in self._infos:
            raise DamagedFile(f"{self.folder}: no tensor named {key!r} among its {len(self)} tensors")
        return self._infos[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises DamagedFile if there is no such key."""
        return self.info(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor as stored. Raises DamagedFile if there is no such key."""
        return self.info(key).dtype

    def get(self, key: str) -> torch.Tensor:
        """The tensor on the CPU, exactly as stored. Raises DamagedFile if there is no such key.

        The file is mapped again for each tensor. The pages of a mapping that is kept open stay in memory, which would
        then grow with the number of blocks.
        """
        with safe_open(self.info(key).file, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor


def open_weights(folder: Path) -> Weights:
    """Open the weights of a component. Reads headers only.

    Args:
        folder: of the component, such as `transformer`.

    Raises:
        MissingFile: if the folder has no weights, or a shard is missing.
        DamagedFile: if a file is truncated or broken, or if the index and the shards disagree.
        UnsupportedCheckpoint: if all weights are pickled.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFile(f"{folder}: no such folder; expected a folder with safetensors weights")
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return Weights(folder, _read_sharded(index))
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return Weights(folder, read_header(single))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UnsupportedCheckpoint(
            f"{folder}: found only pickled weights ({pickles[0]}), which can run code; convert them to safetensors"
        )
    names = " or ".join(f"{stem}.safetensors[.index.json]" for stem in STEMS)
    raise MissingFile(f"{folder}: no weights; expected {names}")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file.

    Returns:
        File, shape and dtype of each tensor by key.

    Raises:
        DamagedFile: if the file is truncated, or is no safetensors file.
        InvalidInput: if a tensor has an unknown dtype.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= MAX_HEADER_BYTES:
            raise DamagedFile(f"{file}: not a safetensors file, or a truncated one ({size} bytes)")
        raw = f.read(length)
    if len(raw) < length:
        raise DamagedFile(
            f"{file}: truncated: {size} bytes, its header alone needs {8 + length}; copy or download it again"
        )
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        described = {
            key: (entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for key, entry in header.items()
        }
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DamagedFile(f"{file}: not a safetensors file: its header cannot be read ({error})") from error
    if size != needed:
        raise DamagedFile(
            f"{file}: truncated or damaged: {size} bytes, its header says {needed}; copy or download it again"
        )
    return {key: _tensor_info(file, key, *entry) for key, entry in described.items()}


def _tensor_info(file: Path, key: str, dtype: str, shape: tuple[int, ...], start: int) -> TensorInfo:
    if dtype not in DTYPES:
        raise InvalidInput(f"{file}: tensor {key!r} has dtype {dtype}; allowed: {', '.join(DTYPES)}")
    return TensorInfo(file, shape, DTYPES[dtype], start)


def _read_sharded(index: Path) -> dict[str, TensorInfo]:
    """The tensors of all shards of an index. Checks that index and shards have the same keys."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFile(f"{index}: not a safetensors index: expected JSON with a weight_map ({error})") from error
    infos: dict[str, TensorInfo] = {}
    for name in shards:
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise MissingFile(f"{index}: names the shard {name!r}, which is no file in {index.parent}")
        shard = read_header(file)
        if unlisted := sorted(key for key in shard if weight_map.get(key) != name):
            raise DamagedFile(f"{file}: holds tensor {unlisted[0]!r}, which {index.name} does not list there")
        infos.update(shard)
    if absent := sorted(set(weight_map) - set(infos)):
        raise DamagedFile(f"{index}: lists tensor {absent[0]!r} in {weight_map[absent[0]]}, which does not hold it")
    return infos
