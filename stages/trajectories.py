"""trajectories: sample the calibration prompts with the source model and record what its experts were given."""

from functools import cache
from pathlib import Path
from typing import Any

from stages import artifacts
from stages.common import ParamsFile, Stage, open_stage, read_json
from stages.pipeline import source_pipeline
from stepquant.calibration import remote
from stepquant.calibration.arrays import group_metadata
from stepquant.calibration.prompts import Prompt, recorded_prompts
from stepquant.calibration.trajectories import recorded, write_trajectory
from stepquant.commands import command, main
from stepquant.compute.progress import track
from stepquant.compute.units import gather
from stepquant.models.sampling import sample

READS = ("compute", "sampling", "trajectories", "storage")


@command
def trajectories(params: ParamsFile = Path("params.yaml")) -> None:
    """Sample the calibration prompts and record every call of a denoiser; the only stage that samples the source model.

    Reads the params sections compute, sampling, trajectories and storage. Writes artifacts/trajectories.zarr.
    """
    with open_stage(__file__, READS, params) as stage:
        manifest = read_json(artifacts.MODEL)
        prompts = recorded_prompts(stage["trajectories"])
        pipe = cache(lambda: source_pipeline(manifest, stage["compute"], stage["sampling"]))  # not loaded when every unit is there
        units = {}
        for prompt in track(prompts, "trajectories"):
            key = stage.key(("compute", "sampling", "storage"), model=manifest["files"], prompt=prompt.digest())
            units[prompt.id] = stage.units.make(key, lambda folder: record(pipe(), stage, prompt, folder))
        digests = {name: unit.digest for name, unit in units.items()}
        gather(units, artifacts.TRAJECTORIES, {"zarr.json": group_metadata({"prompts": digests})})


def record(pipe: Any, stage: Stage, prompt: Prompt, folder: Path) -> None:
    """Sample one prompt and write its trajectory, into the object store if there is one."""
    experts = {"high_noise": pipe.transformer, "low_noise": pipe.transformer_2} if pipe.transformer_2 else {"denoiser": pipe.transformer}
    with recorded(experts) as calls:
        sample(pipe, stage["sampling"], prompt.prompt, prompt.negative_prompt, prompt.load_image(), prompt.seed, "latent")
    write_trajectory(folder, calls, pipe.transformer.config.out_channels, prompt.split, f"prompt {prompt.id}")
    if stage["storage"].url is not None:
        remote.move(folder, stage["storage"].url)


if __name__ == "__main__":
    main(trajectories)
