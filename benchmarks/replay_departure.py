"""How far a replay is from what the pipeline computed, and what stage capture allows (calibration/replay_check.py).

    python benchmarks/replay_departure.py                  a tiny random pipeline of every published model, 2 blocks
    python benchmarks/replay_departure.py --blocks 40      the same as deep as Wan2.2-I2V-A14B
    python benchmarks/replay_departure.py --source FOLDER  a model of yours, on gray pictures

The pipeline calls its denoisers with a batch of one, the replay with up to --batch calls at a time. Departures are the
largest over all calls, relative to the values that were recorded. Then the cost: what recording adds to the
processor time of sampling, and the bytes of the samples.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.local_compute import local_compute
from benchmarks.tiny_pipelines import TINY_PIPELINES, save_pipeline
from stepquant.calibration.recorder import recorded
from stepquant.calibration.replay_check import ReplayCheck, tolerance
from stepquant.calibration.trajectories import Call, Trajectories
from stepquant.calibration.trajectory_files import write_trajectory
from stepquant.models.expert import open_expert
from stepquant.models.families import find_family
from stepquant.models.manifest import ModelManifest
from stepquant.models.sampling import sample, source_pipeline
from stepquant.models.source import describe_experts
from stepquant.params import Compute, Sampling
from stepquant.storage.zarr_groups import group_metadata

PROMPT = "prompt"


@dataclass(frozen=True)
class Departures:
    """Largest departures of an expert: per block, and of the denoiser's output."""

    calls: int
    blocks: list[float]
    output: float


def settings(manifest: ModelManifest, options: argparse.Namespace) -> Sampling:
    image_tokens = any("attn2.add_kv" in described.sites for described in manifest.experts.values())
    return Sampling(
        height=options.size,
        width=options.size,
        num_frames=options.frames,
        steps=options.steps,
        flow_shift=4.0,
        guidance_scale=3.0,
        guidance_scale_2=3.0,
        max_sequence_length=512 if image_tokens else options.text_tokens,
    )


def record(manifest: ModelManifest, compute: Compute, sampling: Sampling, folder: Path) -> tuple[float, int]:
    """Record one prompt. Returns what recording adds to the processor time of sampling, and the bytes per call."""
    pipe = source_pipeline(manifest, compute, sampling, folder / "no_scratch")
    pictures = {name: Image.new("RGB", (64, 64), "gray") for name in manifest.images.required}
    experts = {name: getattr(pipe, described.subfolder) for name, described in manifest.experts.items()}
    sample(pipe, sampling, "a red crab runs", "", pictures, 0, "latent")  # costs of the first run only
    start = time.process_time()
    with recorded(experts) as calls:
        sample(pipe, sampling, "a red crab runs", "", pictures, 0, "latent")
    seconds = time.process_time() - start
    start = time.process_time()
    sample(pipe, sampling, "a red crab runs", "", pictures, 0, "latent")
    extra = seconds / (time.process_time() - start) - 1
    channels = next(iter(manifest.experts.values())).inputs.out_channels
    denoiser = find_family(manifest.pipeline).denoiser
    write_trajectory(folder / PROMPT, calls, sampling.steps, denoiser, channels, "calibration", PROMPT)
    (folder / "zarr.json").write_text(group_metadata({"prompts": {PROMPT: ""}}))
    taken = sum(call.samples.blocks.nbytes + call.samples.output.nbytes for call in calls if call.samples)
    return extra, taken // len(calls)


def replayed(
    manifest: ModelManifest, compute: Compute, folder: Path, batch: int
) -> Iterator[tuple[str, torch.dtype, Departures]]:
    """The departures of every expert."""
    trajectories = Trajectories(folder)
    for name, described in manifest.experts.items():
        model = open_expert(manifest, name, compute)
        calls, glue = trajectories.calls(name), model.glue()
        batches = [calls[start : start + batch] for start in range(0, len(calls), batch)]
        check = ReplayCheck(name, described.blocks, model, trajectories, batches)
        inputs = [glue.inputs(trajectories.inputs(part)) for part in batches]
        blocks = []
        for index in range(described.blocks):
            block = model.block(index)
            for n, given in enumerate(inputs):
                output = given.run(block)
                check.add_block(index, n, output)
                inputs[n] = replace(given, hidden_states=output)
            blocks.append(largest(check))
        for n, (part, found) in enumerate(zip(batches, inputs)):
            check.add_output(n, glue.output(trajectories.inputs(part), found.hidden_states))
        yield name, model.dtype, Departures(len(calls), blocks, largest(check))


def largest(check: ReplayCheck) -> float:
    found: tuple[float, Call] | None = check.largest()
    return found[0] if found else 0.0


def rows(title: str, source: Path, options: argparse.Namespace) -> None:
    manifest = describe_experts(source, str(source), None)
    for dtype in options.dtypes:
        compute = local_compute(dtype, options.device)
        with tempfile.TemporaryDirectory() as scratch:
            extra, taken = record(manifest, compute, settings(manifest, options), Path(scratch))
            for expert, kind, found in replayed(manifest, compute, Path(scratch), options.batch):
                depth = len(found.blocks)
                numbers = (found.blocks[0], tolerance(kind, 1), max(found.blocks), found.output)
                cells = [f"{number:.1e}" for number in (*numbers, tolerance(kind, depth + 1))]
                print(
                    f"| {title} | {expert} | {dtype} | {found.calls} | {' | '.join(cells)} "
                    f"| {extra:+.0%} | {taken / 1e3:.0f} kB |",
                    flush=True,
                )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a diffusers folder instead of the tiny pipelines")
    parser.add_argument("--blocks", type=int, default=2, help="of the tiny pipelines")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="calls per forward of the replay")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--text-tokens", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| model | expert | dtype | calls | block 0 | allowed | largest of all blocks | output | allowed "
        "| time of recording | samples per call |"
    )
    print("|---" * 11 + "|")
    if options.source:
        rows(options.source.name, options.source, options)
        return
    for name, described in TINY_PIPELINES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows(name, save_pipeline(Path(folder) / "model", described, options.blocks), options)


if __name__ == "__main__":
    main()
