"""A pretend device: inside `with pretend_device():`, "pretend:0" and "pretend:1" can be used as "cuda:0" would be.

Values are those of the CPU; mistakes are those of CUDA (tests/device/rules.py). Torch allows one such backend per
process and cannot take it away again, so it stays registered. What other libraries are taught ends with the block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.optim.optimizer as optimizers
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.device.attention import attention
from tests.device.libraries import libraries_that_know_the_device
from tests.device.rules import DEVICES, NAME
from tests.device.tensor import FACTORIES, PretendTensor, aten, copy_from, make
from tests.device.traffic import LEDGER, Ledger, Traffic

__all__ = ["DEVICES", "NAME", "PretendTensor", "Traffic", "pretend_device"]

_LIBRARIES: list[torch.library.Library] = []


class _Module:
    """torch.pretend, as far as torch, diffusers and accelerate ask for it."""

    _current = 0

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return DEVICES

    def current_device(self) -> int:
        return self._current

    def set_device(self, device: int | str | torch.device) -> None:
        self._current = torch.device(device).index if not isinstance(device, int) else device

    def synchronize(self, device: object = None) -> None:
        LEDGER.count("host_reads")

    def empty_cache(self) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def max_memory_allocated(self, device: object = None) -> int:
        return LEDGER.peak[self._current]


@contextmanager
def pretend_device(limit: int | None = None) -> Iterator[Ledger]:
    """Make the device usable for the length of the block, and give what counts its traffic, from zero.

    limit: bytes that live on one device at a time; more raise torch.OutOfMemoryError.
    """
    _register()
    LEDGER.clear()
    LEDGER.limit = limit
    try:
        # Torch runs a backward pass in one thread per device, and counts but one of a backend written in Python.
        with libraries_that_know_the_device(), torch.autograd.set_multithreading_enabled(False):
            yield LEDGER
    finally:
        LEDGER.limit = None


def _register() -> None:
    if _LIBRARIES:
        return
    _setup_privateuseone_for_python_backend(NAME, _Module())
    # torch's choice of optimizer kernels goes by the exact type of the parameters.
    optimizers._foreach_supported_types.append(PretendTensor)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(make, "PrivateUse1")
    named = torch.library.Library("aten", "IMPL")
    for name, op in FACTORIES.items():
        named.impl(name, partial(make, op), "PrivateUse1")
    named.impl("_copy_from", copy_from, "PrivateUse1")
    named.impl("scaled_dot_product_attention", aten.scaled_dot_product_attention.default, "PrivateUse1")
    named.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    _LIBRARIES.extend([everything, named])
