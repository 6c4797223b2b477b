"""How to lay out one block's activations in Zarr: seconds, memory and files of every candidate, on the real shapes.

    python benchmarks/zarr_layout.py FOLDER       one block of Wan2.2-I2V-A14B, 3 bins, 2,048 tokens a sample
    python benchmarks/zarr_layout.py FOLDER --width 256 --ffn 1024

Each layout is written and read in processes of its own, so the peaks are its own; MD5 is what DVC computes.
Columns: files; seconds to write, to hash and to read; peak resident MB of the writing and the reading process beyond
the largest array itself.
"""

import argparse
import hashlib
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BINS = 3
CHUNK_MB = 32
SLAB = 512  # rows

Specs = list[tuple[str, tuple[int, int], str]]  # name, shape, dtype


def together(channels: int, tokens: int) -> Specs:
    """A site as it is stored (calibration/statistics_files.py)."""
    statistics = [("hessian", (channels, channels), "float32"), ("channels", (1 + 2 * BINS, channels), "float32")]
    return [*statistics, ("samples", (2 * BINS * tokens, channels), "uint16")]


def by_bin(channels: int, tokens: int) -> Specs:
    """The same with one array per statistic, and per sample of every bin."""
    statistics = [
        (name, (rows, channels), "float32")
        for name, rows in (("hessian", channels), ("shift", 1), ("absmax", BINS), ("mean", BINS))
    ]
    return statistics + [
        (f"{split}.{b}", (tokens, channels), "uint16")
        for split in ("search", "validation", "heldout")
        for b in range(BINS)
    ]


def one_chunk(shape: tuple[int, int], itemsize: int) -> dict:
    return {"chunks": shape}


def row_chunks(shape: tuple[int, int], itemsize: int) -> dict:
    return {"chunks": (_rows(shape, itemsize), shape[1])}


def one_shard(shape: tuple[int, int], itemsize: int) -> dict:
    rows = _rows(shape, itemsize)
    return {"chunks": (rows, shape[1]), "shards": (-(-shape[0] // rows) * rows, shape[1])}


def _rows(shape: tuple[int, int], itemsize: int) -> int:
    return min(shape[0], max(1, CHUNK_MB * 2**20 // (shape[1] * itemsize)))


PLAIN: dict = {"compressors": None}
# Arrays, chunks, and what else is said to Zarr, whose default is zstd.
LAYOUTS: dict[str, tuple[Callable[[int, int], Specs], Callable[[tuple[int, int], int], dict], dict]] = {
    "three arrays, one chunk each": (together, one_chunk, PLAIN),
    "an array per bin, one chunk each": (by_bin, one_chunk, PLAIN),
    "three arrays, a file per 32 MB of rows": (together, row_chunks, PLAIN),
    "three arrays, a shard of 32 MB chunks each": (together, one_shard, PLAIN),
    "three arrays, one chunk each, zstd": (together, one_chunk, {}),
}


def specs_of(layout: str, options: argparse.Namespace) -> Specs:
    """Everything that one block stores."""
    sites = enumerate([options.width] * 6 + [options.ffn])
    return [
        (f"{i}/{name}", shape, dtype)
        for i, channels in sites
        for name, shape, dtype in LAYOUTS[layout][0](channels, options.tokens)
    ]


def write(folder: Path, specs: Specs, layout: str, seconds: multiprocessing.Queue) -> None:
    _, chunking, options = LAYOUTS[layout]
    spent = 0.0
    group = zarr.open_group(folder, mode="w")
    for name, shape, dtype in specs:
        values = normal(shape, dtype)
        start = time.perf_counter()
        stored = group.create_array(name, shape=shape, dtype=dtype, **chunking(shape, values.itemsize), **options)
        stored[...] = values
        spent += time.perf_counter() - start
    seconds.put((spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def normal(shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Normal values, float32, or the bits of bfloat16 as uint16; drawn in slabs, which keeps the peak low."""
    generator, values = np.random.default_rng(0), np.empty(shape, dtype)
    for rows in range(0, len(values), SLAB):
        drawn = generator.standard_normal(values[rows : rows + SLAB].shape, dtype=np.float32)
        values[rows : rows + SLAB] = drawn.view(np.uint32) >> 16 if dtype == "uint16" else drawn
    return values


def read(folder: Path, specs: Specs, seconds: multiprocessing.Queue) -> None:
    group, start = zarr.open_group(folder, mode="r"), time.perf_counter()
    for name, _, _ in specs:
        group[name][...]
    seconds.put((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def in_own_process(function: Callable, *arguments: object) -> tuple[float, float]:
    """Seconds and peak MB of a function in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def hash_files(folder: Path) -> float:
    start = time.perf_counter()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            hashlib.file_digest(file, "md5")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="scratch, about 3 GB")
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--ffn", type=int, default=13824)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    store = options.folder / "layout.zarr"
    zarr.open_group(store, mode="w")
    baseline = in_own_process(read, store, [])[1]
    print("| layout | files | GB | write s | hash s | read s | write MB | read MB |\n|---|---|---|---|---|---|---|---|")
    for layout in LAYOUTS:
        specs = specs_of(layout, options)
        largest = max(shape[0] * shape[1] * np.dtype(dtype).itemsize for _, shape, dtype in specs) / 2**20
        written, write_peak = in_own_process(write, store, specs, layout)
        found = [p for p in store.rglob("*") if p.is_file()]
        size, hashed = sum(p.stat().st_size for p in found) / 1e9, hash_files(store)
        got, read_peak = in_own_process(read, store, specs)
        peaks = [peak - baseline - largest for peak in (write_peak, read_peak)]
        cells = [f"{size:.2f}", *(f"{s:.1f}" for s in (written, hashed, got)), *(f"{peak:.0f}" for peak in peaks)]
        print(f"| {layout} | {len(found)} | {' | '.join(cells)} |", flush=True)
        shutil.rmtree(store)


if __name__ == "__main__":
    main()
