"""Tensors for the tests of several formats."""

import torch
from torch import Tensor

MAGNITUDES = {"ordinary": 1.0, "small": 1e-3, "tiny": 1e-30, "huge": 1e30}


def heavy_tailed(scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded values [48, 512] of about the given scale: large channels, rows of different magnitude, zero groups."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(48, 512, generator=generator)
    x[:, ::37] *= 30
    x *= torch.logspace(-2, 2, 48)[:, None]
    x[0] = 0
    x[1, :64] = 0
    return (x * scale).to(dtype)


def midpoints(values: list[float]) -> Tensor:
    """The points halfway between neighbours of an ascending list, with the float32 just below and just above each."""
    v = torch.tensor(values)
    middle = (v[1:] + v[:-1]) / 2
    below = torch.nextafter(middle, torch.tensor(-torch.inf))
    above = torch.nextafter(middle, torch.tensor(torch.inf))
    return torch.cat((below, middle, above))
