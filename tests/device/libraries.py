"""What libraries beside torch know devices by name, taught the pretend device's name for the length of a block.

That is safetensors alone, whose Rust code accepts `cuda`, `npu`, `hpu` and a few more. Diffusers and accelerate go by
torch.device and by the module torch.<name>.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors
import safetensors.torch
import torch

from tests.device.rules import NAME, is_pretended


@contextmanager
def libraries_that_know_the_device() -> Iterator[None]:
    """Files can be read onto the device, and its tensors written."""
    rust, flatten = safetensors.safe_open, safetensors.torch._flatten_as_ptr

    def flatten_on_cpu(tensors: dict[str, torch.Tensor], *args: Any) -> Any:
        return flatten({name: tensor.cpu() for name, tensor in tensors.items()}, *args)

    safetensors.torch._flatten_as_ptr = flatten_on_cpu
    _replace_everywhere("safe_open", rust, SafeOpen)
    try:
        yield
    finally:
        _replace_everywhere("safe_open", SafeOpen, rust)
        safetensors.torch._flatten_as_ptr = flatten


def _replace_everywhere(name: str, old: object, new: object) -> None:
    """Also where modules have imported the name, under whichever name."""
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", {})
        for alias in [alias for alias, value in list(namespace.items()) if value is old]:
            if module.__name__ != __name__:
                setattr(module, alias, new)


class SafeOpen:
    """safetensors.safe_open for every device: the pretend device's files are opened on the CPU, and tensors then moved.

    What is read onto the CPU is copied out of the mapped file, where tensors are not aligned: the CPU's products of a
    single row then differ in their last bits. A device, which has copies of everything, would seem to be the cause.
    """

    original = safetensors.safe_open

    def __init__(self, filename: Any, framework: str, device: Any = "cpu", **options: Any):
        named = isinstance(device, str | torch.device)
        self.device = torch.device(device) if named and is_pretended(device) else None
        self.file = self.original(filename, framework, "cpu" if self.device else device, **options)

    def __enter__(self) -> "SafeOpen":
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._moved(self.file.get_tensor(name))

    def get_tensors(self, *args: Any) -> dict[str, torch.Tensor]:
        return {name: self._moved(tensor) for name, tensor in self.file.get_tensors(*args).items()}

    def get_slice(self, name: str) -> Any:
        if self.device is not None:
            raise NotImplementedError(f"safetensors slices on the device {NAME}")
        return self.file.get_slice(name)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if self.device is None else tensor.to(self.device)
