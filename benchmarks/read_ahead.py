"""Time of lowrank's work on a block, with and without reading the next block ahead, when no file is in the page cache.

    python benchmarks/read_ahead.py FOLDER                       4 blocks, 2048 wide; 1.5 GB of scratch
    python benchmarks/read_ahead.py FOLDER --width 5120 --ffn 13824 --heads 40      those of Wan2.2-I2V-A14B; 12 GB

FOLDER must not exist. Every file is dropped from the page cache before each pass, and the passes alternate. "disk" is
the time to read the files of a block alone. Linux only.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.make_shape import EXPERT, Calls, Shape, make_shape
from stages import _artifacts as artifacts
from stepquant.calibration.stored_block import StoredBlock
from stepquant.models.expert import open_expert
from stepquant.models.manifest import read_manifest
from stepquant.models.sites import Site
from stepquant.params import section
from stepquant.recipe.factor import factor_site
from stepquant.recipe.settings import FactorSettings
from stepquant.storage.read_ahead import FileRange, read_ahead

ROOT = Path(__file__).resolve().parent.parent


def prepare(folder: Path, shape: Shape) -> None:
    """A folder with a model and its statistics, which becomes the current folder."""
    folder.mkdir(parents=True)
    search = {"candidates": [0.5], "gradient_steps": 0}
    make_shape(folder, shape, Calls(), {"capture": {"search_tokens": 64, "heldout_tokens": 64}, "smooth": search})
    os.chdir(folder)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "lib"), str(ROOT)])}
    for stage in (["stages.model"], ["stages.capture", "--expert", EXPERT]):
        subprocess.run([sys.executable, "-m", *stage], env=environment, check=True)
    os.sync()


@dataclass(frozen=True)
class Blocks:
    """All blocks of the expert, and their sites."""

    blocks: list[StoredBlock]
    sites: tuple[Site, ...]

    def file_ranges(self) -> Iterator[FileRange]:
        for block in self.blocks:
            yield from block.file_ranges(self.sites)


def drop_from_cache(blocks: Blocks) -> None:
    """Drop every file of some blocks from the page cache."""
    for file, start, count in blocks.file_ranges():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(blocks: Blocks, settings: FactorSettings, *, ahead: bool) -> float:
    """Seconds per block of a pass over all blocks with a cold cache."""
    drop_from_cache(blocks)
    start = time.monotonic()
    for block, following in zip(blocks.blocks, [*blocks.blocks[1:], None]):
        if ahead and following is not None:
            read_ahead(following.file_ranges(blocks.sites))
        for site in blocks.sites:
            factor_site(block.weight(site), block.statistics(site), settings)
    return (time.monotonic() - start) / len(blocks.blocks)


def disk_seconds(blocks: Blocks) -> float:
    """Seconds per block to read its files, cold, and nothing else."""
    drop_from_cache(blocks)
    start = time.monotonic()
    for file, first, count in blocks.file_ranges():
        with file.open("rb") as stream:
            stream.seek(first)
            stream.read(count or -1)
    return (time.monotonic() - start) / len(blocks.blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--passes", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare(options.folder, Shape(options.blocks, options.width, options.ffn, options.heads))
    params = Path("params.yaml")
    names = ("format", "smooth", "center", "rotate", "lowrank")
    settings = FactorSettings(*(section(params, name) for name in names))
    manifest = read_manifest(artifacts.MODEL)
    model = open_expert(manifest, EXPERT, section(params, "compute"))
    folders = {"activations": artifacts.activations(EXPERT)}
    stored = [StoredBlock(i, model, folders) for i in range(options.blocks)]
    blocks = Blocks(stored, manifest.expert(EXPERT).ordered_sites)
    times: dict[str, list[float]] = {"plain": [], "read ahead": [], "disk": []}
    for _ in range(options.passes):
        times["plain"].append(seconds(blocks, settings, ahead=False))
        times["read ahead"].append(seconds(blocks, settings, ahead=True))
        times["disk"].append(disk_seconds(blocks))
    for name, found in times.items():
        print(f"{name}: {median(found):.2f} s a block ({min(found):.2f} to {max(found):.2f}, {len(found)} passes)")


if __name__ == "__main__":
    main()
