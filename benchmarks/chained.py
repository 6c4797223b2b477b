"""Does it help to calibrate the low-noise expert behind the quantized high-noise one?

    python benchmarks/chained.py --prompts 24

Both experts are calibrated on trajectories of the BF16 pipeline, but when a video is sampled in four bits, the
low-noise expert starts from latents of the quantized high-noise expert. This runs the pipeline in a copy of this
checkout, records the calibration prompts again with the packed high-noise expert and the BF16 low-noise expert,
quantizes the low-noise expert on these, and compares the videos and the layer error on held-out tokens of the new
trajectories.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.checkout import Checkout, temporary_checkout
from stages import _artifacts as artifacts
from stepquant.calibration.trajectories import record_prompt
from stepquant.checkpoint.pipeline import load_pipeline
from stepquant.compute.progress import track
from stepquant.compute.units import UnitStore, gather
from stepquant.evaluate.metrics_file import Record, read_records
from stepquant.evaluate.packed_layers import layer_errors
from stepquant.evaluate.summary import Bootstrap, interval, paired_difference
from stepquant.models.manifest import read_manifest
from stepquant.models.prompts import recorded_prompts
from stepquant.models.sampling import ready_to_sample, source_pipeline
from stepquant.params import section
from stepquant.storage.digests import content_key
from stepquant.storage.zarr_groups import group_metadata

PARAMS, VARIANT, EXPERT = Path("params.yaml"), "full", "low_noise"


def record_behind_quantized() -> None:
    """Replaces the trajectories by those of the packed high-noise expert followed by the source's low-noise expert."""
    sampling, settings = section(PARAMS, "sampling"), section(PARAMS, "trajectories")
    pipe = ready_to_sample(lambda: load_pipeline(artifacts.checkpoint(VARIANT), dtype=torch.float32), sampling)
    prompts = recorded_prompts(settings)
    store, units = UnitStore(Path(".units/chained")), {}
    with store.scratch() as scratch:
        manifest = read_manifest(artifacts.MODEL)
        source = source_pipeline(manifest, section(PARAMS, "compute"), sampling, scratch)
    pipe.transformer_2 = source.transformer_2
    for prompt in track(prompts, "trajectories"):
        units[prompt.id] = store.make(
            content_key(prompt=prompt.digest()),
            lambda folder: record_prompt(pipe, manifest, sampling, prompt, folder, None),
        )
    digests = {name: unit.digest for name, unit in units.items()}
    gather(units, artifacts.TRAJECTORIES, {"zarr.json": group_metadata({"prompts": digests})})


def run(checkout: Checkout, *command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], cwd=checkout.root, env=checkout.environment, check=True)


def low_noise_error() -> float:
    """Geometric mean over the low-noise expert's sites and bins, on the held-out tokens of its current activations."""
    errors = layer_errors(
        read_manifest(artifacts.MODEL), section(PARAMS, "compute"), artifacts.checkpoint(VARIANT), artifacts.activations
    )
    return geometric_mean(error.error for error in errors if error.expert == EXPERT)


def full_record() -> Record:
    return next(record for record in read_records(artifacts.METRICS) if record.variant == VARIANT)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=24)
    arguments = parser.parse_args()
    with temporary_checkout() as checkout:
        checkout.set("generate.prompts", arguments.prompts)
        checkout.repro("evaluate@bf16", f"evaluate@{VARIANT}")
        os.chdir(checkout.root)
        torch.set_num_threads(section(PARAMS, "compute").threads)
        records = [full_record()]
        record_behind_quantized()
        run(checkout, "stages.capture", "--expert", EXPERT)
        errors = [low_noise_error()]
        for stage in ("lowrank", "gptq", "clip"):
            run(checkout, f"stages.{stage}", "--expert", EXPERT)
        for stage in ("pack", "generate", "evaluate"):
            run(checkout, f"stages.{stage}", "--variant", VARIANT)
        records.append(full_record())
        errors.append(low_noise_error())
    bootstrap = Bootstrap(2000, 0.95, 0)
    psnr = [{name: video.psnr for name, video in r.videos.per_video.items()} for r in records]
    for name, error, values in zip(("on the BF16 trajectory", "behind the quantized expert"), errors, psnr):
        mean = interval(values, bootstrap)
        psnr_text = f"{mean['mean']:.2f} dB [{mean['low']:.2f}, {mean['high']:.2f}]"
        print(f"{name}: low-noise layer error {error:.4f}, PSNR {psnr_text}")
    d = paired_difference(psnr[1], psnr[0], bootstrap)
    print(f"difference: {d['mean']:+.2f} dB [{d['low']:+.2f}, {d['high']:+.2f}]")


if __name__ == "__main__":
    main()
