"""Peak memory of the stages on real shapes; it must not grow with the number of blocks.

    python benchmarks/memory.py FOLDER                          1, 2 and 4 blocks of Wan2.2-I2V-A14B; 15 GB of scratch
    python benchmarks/memory.py FOLDER --plot docs/memory.svg   also write the plot

Every stage is a process of its own, started from a small parent. The number is ru_maxrss of os.wait4: the kernel's
high-water mark of the process's resident set, which includes mapped pages of weight files. Search and refits are
reduced to one alpha, two dampings, one refit and 256 tokens a sample, which changes the time, not the peak.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("capture", "lowrank", "gptq", "clip")
EXPERT = "denoiser"  # the one expert of benchmarks/make_shape.py
LIMIT_GB = 8.0


@dataclass(frozen=True)
class Peak:
    """One stage over all blocks of a shape: peak resident memory in GB (10^9 bytes), and seconds."""

    blocks: int
    stage: str
    gigabytes: float
    seconds: float


def run(command: list[str], folder: Path, threads: int) -> tuple[float, float]:
    """Peak resident GB and seconds of a command run in a folder; ends this program if it fails."""
    path = os.pathsep.join([str(ROOT / "lib"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=folder, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed in {folder}")
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - start


def measure(folder: Path, blocks: int, stages: list[str], shape: list[str], threads: int) -> list[Peak]:
    """Make a shape of some blocks, and run some stages on it."""
    folder.mkdir(parents=True)
    run([str(ROOT / "benchmarks" / "make_shape.py"), ".", "--blocks", str(blocks), *shape], folder, threads)
    shorten(folder / "params.yaml")
    run(["-m", "stages.model"], folder, threads)
    peaks = []
    for stage in stages:
        peaks.append(Peak(blocks, stage, *run(["-m", f"stages.{stage}", "--expert", EXPERT], folder, threads)))
        print(
            f"{blocks} blocks, {stage}: {peaks[-1].gigabytes:.2f} GB, {peaks[-1].seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return peaks


def shorten(params: Path) -> None:
    """Fewer candidates and refits, the same tensors at once."""
    import yaml

    values = yaml.safe_load(params.read_text())
    values["smooth"]["candidates"] = [0.5]
    values["gptq"] |= {"refits": 1, "dampings": values["gptq"]["dampings"][:2]}
    values["capture"] |= {"search_tokens": 256, "heldout_tokens": 256}
    params.write_text(yaml.safe_dump(values, sort_keys=False))


def table(peaks: list[Peak]) -> str:
    """A row per stage, a column per number of blocks."""
    counts = sorted({peak.blocks for peak in peaks})
    lines = [
        f"| stage | {' | '.join(f'{n} blocks' for n in counts)} | largest / smallest |",
        "|---" * (len(counts) + 2) + "|",
    ]
    for stage in dict.fromkeys(peak.stage for peak in peaks):
        found = {peak.blocks: peak for peak in peaks if peak.stage == stage}
        sizes = [found[n].gigabytes for n in counts]
        cells = " | ".join(f"{found[n].gigabytes:.2f} GB, {found[n].seconds:.0f} s" for n in counts)
        lines.append(f"| {stage} | {cells} | {max(sizes) / min(sizes):.2f} |")
    return "\n".join(lines)


def plot(peaks: list[Peak], file: Path) -> None:
    """The table as a figure; equal numbers give equal bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from stepquant.report.plots import COLORS, MARKERS, STYLE

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for stage, colour, marker in zip(STAGES, COLORS, MARKERS):
            points = sorted((peak.blocks, peak.gigabytes) for peak in peaks if peak.stage == stage)
            axes.plot(*zip(*points), label=stage, color=colour, marker=marker)
        axes.axhline(LIMIT_GB, color="#888888", linestyle="--", linewidth=1, label="goal at the full width")
        axes.set(xlabel="blocks of the model", ylabel="peak resident memory, GB", ylim=(0, LIMIT_GB * 1.1))
        axes.set_xticks(sorted({peak.blocks for peak in peaks}))
        figure.legend(ncols=len(STAGES) + 1, loc="outside upper center")
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="scratch; a folder per number of blocks is made in it and removed again"
    )
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="each needs those before it; gptq takes longest"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="also write every number here")
    options, shape = parser.parse_known_args()  # what is left goes to make_shape.py
    peaks: list[Peak] = []
    for blocks in options.blocks:
        folder = options.folder / f"blocks_{blocks}"
        shutil.rmtree(folder, ignore_errors=True)
        peaks += measure(folder, blocks, options.stages, shape, options.threads)
        shutil.rmtree(folder)
        if options.json:
            options.json.write_text(json.dumps([asdict(peak) for peak in peaks], indent=1) + "\n")
    print(table(peaks))
    if options.plot:
        plot(peaks, options.plot)


if __name__ == "__main__":
    main()
