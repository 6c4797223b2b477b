"""Writes one safetensors file tensor by tensor, so that a file of any size takes the memory of its largest tensor.

The library's own writer needs all tensors at once. Format: github.com/huggingface/safetensors, README: the length of
the header in 8 bytes, the header in JSON (padded with spaces to a multiple of 8), the values in row-major order.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is made when it is written.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, one of NAMES.
        load: Makes it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def stream_safetensors(file: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Equal tensors and metadata give equal bytes.

    Tensors are in the order of falling element size, then of their names, so that every one is aligned to its elements.

    Args:
        file: The file to write.
        tensors: What is written, by name.
        metadata: The file's own metadata.

    Raises:
        ValueError: A tensor that is made has another shape or dtype than its source says.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in order:
        source = tensors[name]
        end = start + source.nbytes
        header[name] = {"dtype": NAMES[source.dtype], "shape": list(source.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            out.write(_bytes(name, tensors[name]))


def _bytes(name: str, source: TensorSource) -> bytes:
    tensor = source.load().contiguous()
    if (tuple(tensor.shape), tensor.dtype) != (source.shape, source.dtype):
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} is {found}; expected {source.shape} {source.dtype}")
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
