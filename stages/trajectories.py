"""trajectories: sample the calibration prompts with the source model and record the inputs of its experts."""

from functools import cache
from pathlib import Path
from typing import Any

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, Stage, open_stage
from stepquant import params as parameters
from stepquant.calibration.trajectories import record_prompt
from stepquant.command_runner import command, main
from stepquant.compute.progress import track
from stepquant.compute.units import gather
from stepquant.models.checks import check_pictures, check_run
from stepquant.models.manifest import ModelManifest, read_manifest
from stepquant.models.prompts import check_images, recorded_prompts
from stepquant.models.sampling import source_pipeline
from stepquant.models.source import resolve_source
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
        check_pictures(prompts, stage["sampling"], "trajectories.manifest")
        bins = parameters.glance(params, "bins")
        check_run(
            resolve_source(manifest.source, manifest.revision), manifest, stage["sampling"], bins and bins.by_expert
        )
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
