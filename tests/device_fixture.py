"""The fixture `device`: where a unit test runs, on the CPU, on a pretend device, and on CUDA where there is one (marker `gpu`).

The pretend device is the second one, so that whoever drops an index mixes two devices, and fails.
"""

from collections.abc import Iterator

import pytest
import torch

from tests.pretend_device import NAME, pretend_device

CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", f"{NAME}:1", *CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if not request.param.startswith(NAME):
        yield request.param
        return
    with pretend_device():
        yield request.param


def assert_as_on_cpu(found: torch.Tensor, expected: torch.Tensor, device: str, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """found lies on the device; its values are those of the CPU, to the bit but on CUDA, whose sums have another order."""
    assert found.device.type == torch.device(device).type and found.dtype == expected.dtype
    exact = torch.device(device).type != "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=0 if exact else rtol, atol=0 if exact else atol, equal_nan=True)
