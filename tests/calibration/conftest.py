import pytest
import torch

from tests.calibration.calls import site_inputs, text_inputs


@pytest.fixture
def x() -> torch.Tensor:
    return site_inputs()


@pytest.fixture
def text() -> torch.Tensor:
    return text_inputs()
