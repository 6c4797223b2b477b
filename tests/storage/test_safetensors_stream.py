"""The streamed safetensors file against the library's own writer and reader."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stepquant.storage.safetensors_stream import NAMES, TensorSource, stream_safetensors

TENSORS = {
    "b.weight": torch.arange(15, dtype=torch.int8).view(5, 3),
    "a.scale": torch.linspace(-2, 2, 7),
    "a.bias": torch.ones(3, dtype=torch.bfloat16),
    "group": torch.linspace(1, 9, 6).view(2, 3).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
    "one": torch.tensor(5),
    "half": torch.ones(2, dtype=torch.float16),
    "byte": torch.ones(1, dtype=torch.uint8),
}


def sources(tensors):
    return {name: TensorSource(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def test_every_dtype_is_read_back(tmp_path):
    assert {tensor.dtype for tensor in TENSORS.values()} == set(NAMES)
    stream_safetensors(tmp_path / "file", sources(TENSORS), {"format": "pt", "more": '{"a": 1}'})
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name].view(torch.uint8), t.view(torch.uint8)) for name, t in TENSORS.items() if t.ndim)
    assert found["one"] == 5
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "more": '{"a": 1}'}


def test_the_bytes_are_those_of_the_library(tmp_path):
    """But for the order of different dtypes of one size, which the library ranks."""
    tensors = {name: t for name, t in TENSORS.items() if name not in ("group", "byte", "half")}
    stream_safetensors(tmp_path / "ours", sources(tensors), {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path):
    wrong = {"a": TensorSource((2, 2), torch.float32, lambda: torch.ones(4))}
    with pytest.raises(ValueError, match=r"a is \(4,\) torch.float32; expected \(2, 2\)"):
        stream_safetensors(tmp_path / "file", wrong, {})
