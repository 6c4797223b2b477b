"""A tensor that claims to lie on a pretend device: it computes on the CPU, and refuses what CUDA would refuse.

Every operation reaches `PretendTensor.__torch_dispatch__` or, where it makes a tensor out of nothing, `make`. CPU tensors of one
dimension or more are refused beside tensors of the device, and so are tensors of another index. What CUDA allows is allowed:
copies across, 0-dimensional CPU tensors in elementwise operations, and CPU tensors as indices.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from tests.device.traffic import LEDGER, Lease

NAME = "pretend"
DEVICES = 2
aten = torch.ops.aten

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


class PretendTensor(Tensor):
    """Wraps a CPU tensor; nothing but this file may touch `held`."""

    held: Tensor
    lease: Lease

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "PretendTensor":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=device, **layout)

    def __init__(self, held: Tensor, device: torch.device):
        self.held = held
        self.lease = LEDGER.lease(held.untyped_storage(), device.index)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return CROSSING.get(op, compute)(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                copied = self.clone()
            copied = (
                nn.Parameter(copied, self.requires_grad)
                if isinstance(self, nn.Parameter)
                else copied.requires_grad_(self.requires_grad)
            )
            memo[id(self)] = copied
        return memo[id(self)]

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {self.device}"


def normalized(device: torch.device | str) -> torch.device:
    """The device with its index. Raises RuntimeError, as CUDA does, for an index that isn't there."""
    device = torch.device(device)
    index = device.index if device.index is not None else getattr(torch, NAME).current_device()
    if not 0 <= index < DEVICES:
        raise RuntimeError(f"CUDA error: invalid device ordinal ({NAME}:{index}; there are {DEVICES})")
    return torch.device(NAME, index)


# Torch would make these in two steps, the second of which changes the shape of an empty tensor.
FACTORIES = {
    "arange": aten.arange.default,
    "arange.start": aten.arange.start,
    "arange.start_step": aten.arange.start_step,
    "eye": aten.eye.default,
    "eye.m": aten.eye.m,
    "linspace": aten.linspace.default,
    "randperm": aten.randperm.default,
    "randperm.generator": aten.randperm.generator,
}


def is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def make(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """An operation without any tensor of the device among its arguments, asked to leave its result there."""
    if not is_pretended(kwargs.get("device")):
        raise NotImplementedError(f"{op} on the device {NAME}")
    device, described = normalized(kwargs["device"]), describe(op)
    check_generator(kwargs.get("generator"), device)
    LEDGER.count("launches", described.launches)
    return wrapped(op(*args, **kwargs | {"device": "cpu"}), device, {})


def compute(op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Any operation but a copy between devices."""
    described, tensors = describe(op), list(tensors_in([*args, *kwargs.values()]))
    device = common_device(described, args, kwargs, tensors)
    check_generator(kwargs.get("generator"), device)
    own = {id(t.held): t for t in tensors if isinstance(t, PretendTensor)} if described.written else {}
    to_cpu = kwargs.get("device") is not None and not is_pretended(kwargs["device"])
    moved = kwargs | {"device": "cpu"} if kwargs.get("device") is not None else kwargs
    result = op(*unwrapped(args), **{name: unwrapped(value) for name, value in moved.items()})
    LEDGER.count("launches", described.launches)
    LEDGER.count("host_reads", described.waits or waits_for_a_mask(described, args))
    if torch.Tag.inplace_view in op.tags:
        with no_dispatch():
            op(*args, **kwargs)
    check_layout(op, own.values())
    return result if to_cpu else wrapped(result, device, own)


def to_copy(op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Tensor.to of a tensor of the device: a cast there, or a copy to the CPU or to the other device."""
    source, asked = args[0], kwargs.get("device")
    values = op(source.held, **kwargs | {"device": "cpu" if asked is not None else None})
    if asked is None or (is_pretended(asked) and normalized(asked) == source.device):
        LEDGER.count("launches")
        return PretendTensor(values, source.device)
    if is_pretended(asked):
        LEDGER.count("launches")
        return PretendTensor(values, normalized(asked))
    LEDGER.count("host_reads")
    return values


def copy_into(op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Tensor.copy_ within a device and across."""
    target, source = args[:2]
    op(*unwrapped(args), **kwargs)
    here, there = isinstance(target, PretendTensor), isinstance(source, PretendTensor)
    LEDGER.count("launches" if here and there else "copies" if here else "host_reads")
    return target


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Where torch has switched off subclasses, as torch.tensor(values, device=...) does, this is what a copy comes to."""
    return copy_into(aten.copy_.default, (target, source), {})


def never_swapped_in_place(op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Module.to asks whether a parameter may get the moved tensor's contents, which no tensor of another device may."""
    return False


CROSSING = {
    aten._to_copy.default: to_copy,
    aten.copy_.default: copy_into,
    aten._has_compatible_shallow_copy_type.default: never_swapped_in_place,
}


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def common_device(described: Operation, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> torch.device:
    """Where an operation takes place. Raises RuntimeError as CUDA does if its tensors lie in different places."""
    device = next(t.device for t in tensors if isinstance(t, PretendTensor))
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
                f"Expected all tensors to be on the same device, but found at least two devices, {tensor.device} and {device}! "
                f"(in {described.name}, a tensor {list(tensor.shape)})"
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


def check_layout(op: torch._ops.OpOverload, tensors: Iterable[PretendTensor]) -> None:
    """An `out` that is resized would keep the shape that it claims."""
    for tensor in tensors:
        if tensor.shape != tensor.held.shape or tensor.stride() != tensor.held.stride():
            raise NotImplementedError(f"{op} changes a tensor's shape in place, which the device {NAME} cannot follow")


def unwrapped(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.held
    if isinstance(value, list | tuple):
        return type(value)(unwrapped(item) for item in value)
    return value


def wrapped(value: Any, device: torch.device, own: dict[int, PretendTensor]) -> Any:
    """Results as tensors of the device; what was written in place stays the tensor that it was."""
    if isinstance(value, Tensor):
        return own.get(id(value)) if id(value) in own else PretendTensor(value, device)
    if isinstance(value, list | tuple):
        return type(value)(wrapped(item, device, own) for item in value)
    return value
