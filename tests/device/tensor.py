"""A tensor that claims to lie on a pretend device: it computes on the CPU, and refuses what CUDA would refuse.

Every operation reaches `PretendTensor.__torch_dispatch__` or, where it makes a tensor out of nothing, `make`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch

from tests.device.rules import (
    NAME,
    check_generator,
    common_device,
    describe,
    is_pretended,
    normalized,
    tensors_in,
    waits_for_a_mask,
)
from tests.device.traffic import LEDGER, Lease

aten = torch.ops.aten


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
            f"can't convert {self.device} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
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
    """What a copy comes to where torch has switched off subclasses, as torch.tensor(values, device=...) does."""
    return copy_into(aten.copy_.default, (target, source), {})


def never_swapped_in_place(op: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Module.to asks whether a parameter may get the moved tensor's contents, which no tensor of another device may."""
    return False


CROSSING = {
    aten._to_copy.default: to_copy,
    aten.copy_.default: copy_into,
    aten._has_compatible_shallow_copy_type.default: never_swapped_in_place,
}


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
