"""One site of two timestep bins, its statistics as stage capture would keep them, and the demo's settings; no stage."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stepquant.profiles
from stepquant.params import section
from stepquant.recipe.settings import ClipSettings, FactorSettings, RoundSettings
from stepquant.recipe.site_statistics import SiteStatistics

DEMO = Path(stepquant.profiles.__file__).parent / "demo.yaml"
N, K, TOKENS = 48, 128, 1024  # per bin and sample


@dataclass(frozen=True)
class SiteCase:
    """W [N, K], its statistics, and the calibration tokens [T, K] of each bin behind them."""

    W: Tensor
    statistics: SiteStatistics
    calibration: list[Tensor]


@dataclass(frozen=True)
class Settings:
    """The settings of the three parts of the recipe."""

    factor: FactorSettings
    round: RoundSettings
    clip: ClipSettings


@pytest.fixture
def site() -> SiteCase:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(N, K, generator=generator) / K**0.5
    mixing = torch.randn(K // 4, K, generator=generator)
    gain = (0.5 * torch.randn(K, generator=generator)).exp()
    gain[[3, 70]] *= 20

    def tokens(b: int, count: int) -> Tensor:
        x = torch.randn(count, K // 4, generator=generator) @ mixing / (K // 4) ** 0.5
        return ((b + 1) * (x + 0.3 * torch.randn(count, K, generator=generator)) + 0.5) * gain

    calibration = [tokens(b, 4 * TOKENS) for b in range(2)]
    kept: dict[str, Tensor] = {"shift": calibration[0][:64].mean(0)}
    kept["mean"] = torch.stack([x.mean(0) for x in calibration])
    kept["absmax"] = torch.stack([x.abs().amax(0) for x in calibration])
    moved = [x - kept["shift"] for x in calibration]
    kept["hessian"] = torch.stack([x.T @ x / len(x) for x in moved]).mean(0)
    kept["hessian_diagonal"] = kept["hessian"].diagonal()
    for b in range(2):
        kept |= {f"search.{b}": calibration[b][:TOKENS]}
        kept |= {f"{sample}.{b}": tokens(b, TOKENS) for sample in ("validation", "heldout")}
    return SiteCase(W, SiteStatistics(kept.__getitem__, bins=2), calibration)


@pytest.fixture
def settings() -> Callable[..., Settings]:
    """settings(format, section={key: value}, ...): those of the demo profile at rank 8, with keys changed."""

    def make(fmt: str, **changes: dict[str, Any]) -> Settings:
        changes = {"format": {"weight": fmt, "activation": fmt}, "lowrank": {"rank": 8}} | changes
        names = ("format", "smooth", "center", "rotate", "lowrank", "gptq", "clip")
        s = {name: section(DEMO, name).model_copy(update=changes.get(name, {})) for name in names}
        return Settings(
            FactorSettings(s["format"], s["smooth"], s["center"], s["rotate"], s["lowrank"]),
            RoundSettings(s["format"], s["lowrank"], s["gptq"]),
            ClipSettings(s["format"], s["clip"]),
        )

    return make
