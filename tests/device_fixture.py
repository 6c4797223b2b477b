"""The fixture `device`: a test runs on the CPU, on a pretend device, and on CUDA where there is one (marker `gpu`).

The pretend device is the second one, so that whoever drops an index mixes two devices, and fails.
"""

from collections.abc import Iterator

import pytest
import torch

from tests.pretend_device import NAME, pretend_device

CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []

ACCELERATORS = [f"{NAME}:1", *CUDA]


@pytest.fixture(params=["cpu", *ACCELERATORS])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if not request.param.startswith(NAME):
        yield request.param
        return
    with pretend_device():
        yield request.param


def tolerance(device: str, rtol: float = 1e-4, atol: float = 1e-5) -> dict[str, float]:
    """What may differ from the CPU: nothing, but on CUDA, whose sums have another order."""
    return {"rtol": rtol, "atol": atol} if device.startswith("cuda") else {"rtol": 0.0, "atol": 0.0}


def assert_as_on_cpu(
    found: torch.Tensor, expected: torch.Tensor, device: str, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """found lies on the device, and its values are those of the CPU."""
    assert found.device == torch.empty(0, device=device).device and found.dtype == expected.dtype
    torch.testing.assert_close(found.cpu(), expected, **tolerance(device, rtol, atol))
