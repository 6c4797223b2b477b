"""trajectories: sample the calibration prompts with the source model and record the inputs of its experts."""

from functools import cache
from pathlib import Path

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, open_stage
from stepquant.calibration.trajectories import record_prompt
from stepquant.command_runner import command, main
from stepquant.compute.progress import track
from stepquant.compute.units import gather
from stepquant.models.manifest import read_manifest
from stepquant.models.prompts import recorded_prompts
from stepquant.models.sampling import source_pipeline
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
        # Loaded on first use: not at all if every unit is finished.
        pipe = cache(lambda: source_pipeline(manifest, stage["compute"], stage["sampling"]))
        units = {}
        for prompt in track(prompts, "trajectories"):
            key = stage.key(("compute", "sampling", "storage"), model=manifest.digest(), prompt=prompt.digest())
            units[prompt.id] = stage.units.make(
                key, lambda folder: record_prompt(pipe(), stage["sampling"], prompt, folder, stage["storage"].url)
            )
        digests = {name: unit.digest for name, unit in units.items()}
        gather(units, artifacts.TRAJECTORIES, {"zarr.json": group_metadata({"prompts": digests})})


if __name__ == "__main__":
    main(trajectories)
