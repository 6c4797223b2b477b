"""How to lay out one block's activations in Zarr: seconds, memory and files of every candidate, on the real shapes.

    python benchmarks/zarr_layout.py FOLDER                       one block of Wan2.2-I2V-A14B, 3 bins, 2,048 tokens a sample
    python benchmarks/zarr_layout.py FOLDER --width 256 --ffn 1024

Each layout writes and reads in processes of its own, so that peaks are its own; MD5 is what DVC spends on it.
Columns: files; seconds to write, to hash and to read; peak resident MB of the writing and the reading process beyond the
largest array itself.
"""

import argparse
import hashlib
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zarr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BINS = 3
CHUNK_MB = 32


def arrays(width: int, ffn: int, tokens: int) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Name, shape and dtype of what is stored per site: second moments, then a sample per split and bin."""
    for i, channels in enumerate([width] * 6 + [ffn]):
        yield f"{i}/second_moment", (channels, channels), "float32"
        for split in ("search", "heldout"):
            for b in range(BINS):
                yield f"{i}/{split}.{b}", (tokens, channels), "uint16"


def one_chunk(shape: tuple[int, int], itemsize: int) -> dict:
    return {"chunks": shape}


def row_chunks(shape: tuple[int, int], itemsize: int) -> dict:
    return {"chunks": (_rows(shape, itemsize), shape[1])}


def one_shard(shape: tuple[int, int], itemsize: int) -> dict:
    rows = _rows(shape, itemsize)
    return {"chunks": (rows, shape[1]), "shards": (-(-shape[0] // rows) * rows, shape[1])}


def _rows(shape: tuple[int, int], itemsize: int) -> int:
    return min(shape[0], max(1, CHUNK_MB * 2**20 // (shape[1] * itemsize)))


LAYOUTS: dict[str, tuple[Callable, dict]] = {
    "one chunk": (one_chunk, {"compressors": None}),
    "row chunks, a file each": (row_chunks, {"compressors": None}),
    "row chunks in one shard": (one_shard, {"compressors": None}),
    "one chunk, zstd": (one_chunk, {}),
}


def write(folder: Path, layout: str, specs: list, seconds: multiprocessing.Queue) -> None:
    chunking, options = LAYOUTS[layout]
    spent = 0.0
    group = zarr.open_group(folder, mode="w")
    for name, shape, dtype in specs:
        values = np.random.default_rng(0).integers(0, 2**15, size=shape[0] * shape[1] // (2 if dtype == "uint16" else 1), dtype="uint32")
        values = values.view(dtype)[: shape[0] * shape[1]].reshape(shape)
        start = time.perf_counter()
        stored = group.create_array(name, shape=shape, dtype=dtype, **chunking(shape, values.itemsize), **options)
        stored[...] = values
        spent += time.perf_counter() - start
    seconds.put((spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def read(folder: Path, layout: str, specs: list, seconds: multiprocessing.Queue) -> None:
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
    specs = list(arrays(options.width, options.ffn, options.tokens))
    largest = max(shape[0] * shape[1] * np.dtype(dtype).itemsize for _, shape, dtype in specs) / 2**20
    baseline = in_own_process(read, options.folder, "one chunk", [])[1] if _empty(options.folder) else 0.0
    print("| layout | files | GB | write s | hash s | read s | write MB | read MB |\n|---|---|---|---|---|---|---|---|")
    for layout in LAYOUTS:
        store = options.folder / "layout.zarr"
        written, write_peak = in_own_process(write, store, layout, specs)
        found = [p for p in store.rglob("*") if p.is_file()]
        size, hashed = sum(p.stat().st_size for p in found) / 1e9, hash_files(store)
        got, read_peak = in_own_process(read, store, layout, specs)
        peaks = [peak - baseline - largest for peak in (write_peak, read_peak)]
        print(f"| {layout} | {len(found)} | {size:.2f} | {written:.1f} | {hashed:.1f} | {got:.1f} | {peaks[0]:.0f} | {peaks[1]:.0f} |", flush=True)
        shutil.rmtree(store)


def _empty(folder: Path) -> bool:
    """Make the scratch folder with an empty group in it, whose reading is the baseline of every peak."""
    shutil.rmtree(folder, ignore_errors=True)
    zarr.open_group(folder, mode="w")
    return True


if __name__ == "__main__":
    main()
