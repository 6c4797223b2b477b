"""Tiny synthetic pictures, so that no test needs a font or a photo collection."""

from pathlib import Path

import numpy as np
import pytest
from demo_model.settings import ClipSettings, load_section
from demo_model.sprites import Assets

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The repository's data folder."""
    return REPOSITORY / "data"


@pytest.fixture(scope="session")
def clip_settings(data_folder: Path) -> ClipSettings:
    """The geometry that the shipped model was trained with."""
    return load_section(data_folder / "training" / "params.yaml", "clips", ClipSettings)


def speckle(seed: int, side: int) -> np.ndarray:
    """A smooth random picture, (side, side, 3) uint8: has structure everywhere, so that flow can be measured."""
    small = np.random.default_rng(seed).random((side // 8, side // 8, 3))
    large = np.kron(small, np.ones((8, 8, 1)))
    for axis in (0, 1):
        large = sum(np.roll(large, shift, axis) for shift in range(-3, 4)) / 7
    return np.rint(large * 255).astype(np.uint8)


@pytest.fixture(scope="session")
def assets() -> Assets:
    """One disc per split over one speckled photo per split."""
    y, x = np.mgrid[:64, :64] - 31.5
    disc = np.zeros((64, 64, 4), dtype=np.uint8)
    disc[..., :3] = speckle(7, 64) // 2
    disc[..., 0] = np.where(x > 0, 250, 60)
    disc[..., 1] = np.where(y > 0, 250, 20)
    disc[..., 3] = np.where(x**2 + y**2 < 31**2, 255, 0)
    names = {"training": ["ball", "orb"], "evaluation": ["disc"]}
    photos = {"training": ["one", "two"], "evaluation": ["three"]}
    return Assets(
        sprites={name: disc for split in names.values() for name in split},
        photos={name: speckle(seed, 320) for seed, name in enumerate(["one", "two", "three"])},
        splits={"sprites": names, "photos": photos},
    )
