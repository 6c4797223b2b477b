"""What libraries beside torch have to be taught of the pretend device, for the length of a block.

The Rust code of safetensors knows devices by name: `cuda`, `npu`, `hpu` and a few more. Diffusers and accelerate go by
torch.device and by the module torch.<name>, but group offloading moves a parameter by `param.data = moved`, which torch
allows for its own devices only.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers.hooks import group_offloading
from torch import nn

from tests.device.rules import NAME, is_pretended


@contextmanager
def libraries_that_know_the_device() -> Iterator[None]:
    """Files can be read onto the device, its tensors written, and modules offloaded from it."""
    rust, flatten = safetensors.safe_open, safetensors.torch._flatten_as_ptr
    is_other, swap = group_offloading._is_torchao_tensor, group_offloading._swap_torchao_tensor

    def flatten_on_cpu(tensors: dict[str, torch.Tensor], *args: Any) -> Any:
        return flatten({name: tensor.cpu() for name, tensor in tensors.items()}, *args)

    safetensors.torch._flatten_as_ptr = flatten_on_cpu
    _replace_everywhere("safe_open", rust, SafeOpen)
    group_offloading._is_torchao_tensor, group_offloading._swap_torchao_tensor = lambda tensor: True, swap_contents
    try:
        yield
    finally:
        _replace_everywhere("safe_open", SafeOpen, rust)
        safetensors.torch._flatten_as_ptr = flatten
        group_offloading._is_torchao_tensor, group_offloading._swap_torchao_tensor = is_other, swap


def swap_contents(tensor: torch.Tensor, moved: torch.Tensor) -> None:
    """Exchange the contents of a parameter or buffer, which may change its class but not whether it is a parameter."""
    parameter = isinstance(tensor, nn.Parameter)
    torch.utils.swap_tensors(tensor, nn.Parameter(moved, tensor.requires_grad) if parameter else moved)


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
