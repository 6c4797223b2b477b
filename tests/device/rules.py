"""What CUDA refuses, and what an operation costs the host: the rules of the pretend device.

CPU tensors of one dimension or more are refused beside tensors of the device, and so are tensors of another index. What
CUDA allows is allowed: copies across, 0-dimensional CPU tensors in elementwise operations, and CPU tensors as indices.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.device.traffic import LEDGER

NAME = "pretend"
DEVICES = 2

# Indices may lie on the CPU, from where they are copied.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index", "aten::_index_put_impl_"}
# Operations that take a 0-dimensional CPU tensor as a value though they aren't elementwise.
TAKE_A_VALUE = INDEXING | {
    "aten::fill",
    "aten::fill_",
    "aten::index_fill",
    "aten::index_fill_",
    "aten::masked_fill",
    "aten::masked_fill_",
}
# CUDA has to know, on the host, how large a result is or whether a factorization went well.
WAITED_FOR = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave",
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::linalg_cholesky",
    "aten::_linalg_solve_ex",
    "aten::linalg_inv",
    "aten::linalg_eig",
    "aten::linalg_lstsq",
    "aten::_linalg_check_errors",
}
# These start no kernel: they reserve memory, or only look at it.
NO_KERNEL = {
    "aten::empty",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::detach",
}


@dataclass(frozen=True)
class Operation:
    """What the schema of an operation says about it."""

    name: str
    indexing: bool
    takes_values: bool  # whether a 0-dimensional CPU tensor may stand beside tensors of the device
    launches: bool
    waits: bool
    written: frozenset[int | str]  # positions and names of the arguments that it writes to


@cache
def describe(op: torch._ops.OpOverload) -> Operation:
    schema, name = op._schema, op._schema.name
    written = {i for i, argument in enumerate(schema.arguments) if argument.is_write} | {
        a.name for a in schema.arguments if a.is_write
    }
    scalars = not any("Tensor" in str(result.type) for result in schema.returns) and bool(schema.returns)
    return Operation(
        name=name,
        indexing=name in INDEXING,
        takes_values=torch.Tag.pointwise in op.tags or name in TAKE_A_VALUE,
        launches=not (op.is_view or name in NO_KERNEL or (scalars and name != "aten::equal")),
        waits=scalars or name in WAITED_FOR,
        written=frozenset(written),
    )


def normalized(device: torch.device | str) -> torch.device:
    """The device with its index. Raises RuntimeError, as CUDA does, for an index that isn't there."""
    device = torch.device(device)
    index = device.index if device.index is not None else getattr(torch, NAME).current_device()
    if not 0 <= index < DEVICES:
        raise RuntimeError(f"CUDA error: invalid device ordinal ({NAME}:{index}; there are {DEVICES})")
    return torch.device(NAME, index)


def is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def common_device(described: Operation, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> torch.device:
    """Where an operation takes place. Raises RuntimeError as CUDA does if its tensors lie in different places."""
    device = next(t.device for t in tensors if t.device.type == NAME)
    indices = list(tensors_in([args[1]])) if described.indexing else []
    written = [t for key in described.written for t in tensors_in([argument(args, kwargs, key)])]
    for tensor in tensors:
        if tensor.device == device:
            continue
        if tensor.device.type == "cpu" and any(tensor is index for index in indices):
            LEDGER.count("copies")
        elif (
            tensor.device.type != "cpu"
            or not described.takes_values
            or tensor.dim()
            or any(tensor is target for target in written)
        ):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{tensor.device} and {device}! (in {described.name}, a tensor {list(tensor.shape)})"
            )
    return device


def argument(args: tuple, kwargs: dict[str, Any], key: int | str) -> Any:
    if isinstance(key, str):
        return kwargs.get(key)
    return args[key] if key < len(args) else None


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is not None:
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{generator.device.type}'")


def waits_for_a_mask(described: Operation, args: tuple) -> bool:
    """Whether an index is a mask, whose hits the host has to count; a single value is put without."""
    if not described.indexing:
        return False
    one_value = len(args) > 2 and args[2].numel() == 1
    return not one_value and any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in([args[1]]))
