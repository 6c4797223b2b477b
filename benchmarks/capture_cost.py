"""What statistics cost: one block's forward with and without the accumulation of stage capture.

    python benchmarks/capture_cost.py FOLDER      a block of Wan2.2-I2V-A14B, 8,192 tokens
    python benchmarks/capture_cost.py FOLDER --calls-frames 21 --calls-height 60 --calls-width 104
                                                  a call of 81 frames

Processor seconds per recorded call of the calibration split, the fastest of some rounds. Held-out calls add almost
nothing, so with 8 calibration and 4 held-out prompts a capture adds two thirds of what is shown here.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.make_shape import EXPERT, add_options, from_options, make_shape
from stepquant.calibration.observer import SiteObserver
from stepquant.calibration.replay import replay_block
from stepquant.calibration.sampling_plan import plan_sampling
from stepquant.calibration.trajectories import Trajectories
from stepquant.models.bins import make_bins
from stepquant.models.denoiser import Denoiser
from stepquant.models.sites import Site

SAMPLES = {"calibration": 2048, "validation": 2048, "heldout": 2048}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def accumulating(
    trajectories: Trajectories, sites: tuple[Site, ...], stride: int
) -> Callable[[str, torch.Tensor, range], None]:
    """What stage capture does with a site's input."""
    calls, statistics = trajectories.calls(EXPERT), {}
    bins = make_bins(1, 0, 1000, "bins")
    depends = {site.name: site.depends_on_timestep for site in sites}

    def observe(site: str, x: torch.Tensor, positions: range) -> None:
        if site not in statistics:
            plan = plan_sampling(calls, bins if depends[site] else None, x.shape[1], SAMPLES, 0, stride=stride)
            statistics[site] = SiteObserver(x.shape[-1], plan, "cpu", site)
        statistics[site].observe(x, [calls[i] for i in positions], positions)

    return observe


def fastest(work: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(model: Denoiser, trajectories: Trajectories, stride: int, rounds: int) -> tuple[float, float, int]:
    """Seconds of the plain forward and with statistics, and the tokens of the call."""
    block, call = model.block(0), trajectories.calls(EXPERT)[:1]
    inputs, sites = model.glue().inputs(trajectories.inputs(call)), model.description.sites(model.config)
    observe = accumulating(trajectories, sites, stride)
    plain = lambda: inputs.run(block)  # noqa: E731
    replayed = lambda: list(replay_block(block, sites, [(range(1), inputs)], observe))  # noqa: E731
    plain(), replayed()  # costs of the first call only
    return fastest(plain, rounds), fastest(replayed, rounds), inputs.hidden_states.shape[1]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scratch, 1.2 GB")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--strides", nargs="+", type=int, default=[1, 4], help="values of capture.hessian_stride")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    add_options(parser)
    parser.set_defaults(
        calls_calibration=1,
        calls_validation=1,
        calls_heldout=1,
        calls_steps=1,
        calls_frames=8,
        calls_height=64,
        calls_width=64,
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    make_shape(options.folder, *from_options(options, 1), {})
    trajectories = Trajectories(options.folder / "artifacts" / "trajectories.zarr")
    print(
        "| dtype | tokens | one of so many summed | forward s | with statistics s | ratio |\n|---|---|---|---|---|---|"
    )
    for name in options.dtypes:
        model = Denoiser(options.folder / "model" / "transformer", "cpu", DTYPES[name])
        for stride in options.strides:
            plain, kept, tokens = measure(model, trajectories, stride, options.rounds)
            print(f"| {name} | {tokens} | {stride} | {plain:.1f} | {kept:.1f} | {kept / plain:.2f} |", flush=True)
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
