"""trajectories: sample the calibration prompts with the source model and record the inputs of its experts."""

from functools import cache
from pathlib import Path
from typing import Any

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, Stage, open_stage
from stepquant.calibration.trajectories import record_prompt
from stepquant.command_runner import command, main
from stepquant.compute.progress import track
from stepquant.compute.units import gather
from stepquant.models.manifest import ModelManifest, read_manifest
from stepquant.models.prompts import check_images, recorded_prompts
from stepquant.models.sampling import source_pipeline
from stepquant.models.source import check_sampling
from stepquant.storage.zarr_groups import group_metadata

READS = ("compute", "sampling", "trajectories", "storage")


@command
def trajectories(params: ParamsFile = Path("params.yaml")) -> None:
    """Sample the calibration prompts with the source model and record every call of a denoiser.

    Reads the params sections compute, sampling, trajectories and storage. Writes artifacts/trajectories.zarr.
    """
    with open_stage(__file__, READS, params) as stage:
        manifest = read_manifest(artifacts.MODEL)
        prompts = recorded_prompts(stage["trajectories"])
        check_images(prompts, manifest.images, stage["trajectories"].manifest)
        check_sampling(manifest, stage["sampling"])
        # Loaded on first use: not at all if every unit is finished.
        pipe = cache(lambda: load(stage, manifest))
        units = {}
        for prompt in track(prompts, "trajectories"):
            key = stage.key(("compute", "sampling", "storage"), model=manifest.digest(), prompt=prompt.digest())
            units[prompt.id] = stage.units.make(
                key,
                lambda folder: record_prompt(pipe(), manifest, stage["sampling"], prompt, folder, stage["storage"].url),
            )
        digests = {name: unit.digest for name, unit in units.items()}
        gather(units, artifacts.TRAJECTORIES, {"zarr.json": group_metadata({"prompts": digests})})


def load(stage: Stage, manifest: ModelManifest) -> Any:
    """The source pipeline."""
    with stage.units.scratch() as folder:
        return source_pipeline(manifest, stage["compute"], stage["sampling"], folder)


if __name__ == "__main__":
    main(trajectories)
