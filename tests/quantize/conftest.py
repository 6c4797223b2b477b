"""Seeded layers with heavy tails and outlier channels, small enough for many tests."""

import pytest
import torch
from torch import Tensor


def _make_layer(seed: int, rows: int, channels: int, tokens: int) -> tuple[Tensor, Tensor]:
    """W [rows, channels] and x [tokens, channels]: correlated channels of unequal magnitude, two of them outliers."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W = randn(rows, channels) / channels**0.5 + 0.3 * randn(rows, 4) @ randn(4, channels) / channels**0.5
    x = randn(tokens, channels // 4) @ randn(channels // 4, channels) / (channels // 4) ** 0.5 + 0.5 * randn(
        tokens, channels
    )
    x = x * (0.5 * randn(channels)).exp()
    x[:, [3, channels // 2]] *= 30
    return W, x


@pytest.fixture
def make_layer():
    return _make_layer


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    return _make_layer(seed=0, rows=48, channels=128, tokens=512)
