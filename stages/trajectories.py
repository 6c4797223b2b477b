"""trajectories: sample the calibration prompts with the source model and record the inputs of its experts."""

from functools import cache, partial
from pathlib import Path
from typing import Any

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, Stage, described_model, open_stage
from stepquant import params as parameters
from stepquant.calibration.captions import record_captions
from stepquant.calibration.trajectories import CAPTIONS, record_prompt
from stepquant.command_runner import command, main
from stepquant.compute.progress import track
from stepquant.compute.units import Unit, gather
from stepquant.models.captions import read_captions
from stepquant.models.checks import check_pictures, check_run
from stepquant.models.manifest import ModelManifest
from stepquant.models.prompts import Prompt, check_images, check_measured, recorded_prompts
from stepquant.models.sampling import source_pipeline
from stepquant.models.source import resolve_source
from stepquant.storage.zarr_groups import group_metadata

READS = ("compute", "sampling", "trajectories", "storage")


@command
def trajectories(params: ParamsFile = Path("params.yaml")) -> None:
    """Sample the calibration prompts with the source model and record every call of a denoiser; encode the captions.

    Reads the params sections compute, sampling, trajectories and storage. Writes artifacts/trajectories.zarr.
    """
    with open_stage(__file__, READS, params) as stage:
        manifest = described_model()
        prompts = recorded_prompts(stage["trajectories"])
        check_images(prompts, manifest.images, stage["trajectories"].manifest)
        check_pictures(prompts, stage["sampling"], "trajectories.manifest")
        bins, measured = (parameters.glance(params, section) for section in ("bins", "sensitivity"))
        if measured is not None:
            check_measured(measured, sum(prompt.split == "calibration" for prompt in prompts))
        check_run(
            resolve_source(manifest.source, manifest.revision), manifest, stage["sampling"], bins and bins.by_expert
        )
        text_prompts = stage["trajectories"].text_prompts
        captions = [] if text_prompts is None else read_captions(Path(text_prompts))
        units = record(stage, manifest, prompts, captions)
        digests = {name: unit.digest for name, unit in units.items()}
        gather(units, artifacts.TRAJECTORIES, {"zarr.json": group_metadata({"prompts": digests})})


def record(stage: Stage, manifest: ModelManifest, prompts: list[Prompt], captions: list[str]) -> dict[str, Unit]:
    """The finished units: one per prompt, and one of all captions if there are any."""
    # Loaded on first use: not at all if every unit is finished.
    pipe = cache(lambda: load(stage, manifest))
    key = partial(stage.key, ("compute", "sampling", "storage"), model=manifest.digest())
    sampling, url = stage["sampling"], stage["storage"].url
    units = {}
    for prompt in track(prompts, "trajectories"):
        units[prompt.id] = stage.units.make(
            key(prompt=prompt.digest()),
            lambda folder: record_prompt(pipe(), manifest, sampling, prompt, folder, url),
        )
    if captions:
        units[CAPTIONS] = stage.units.make(
            key(captions=captions), lambda folder: record_captions(pipe(), manifest, sampling, captions, folder, url)
        )
    return units


def load(stage: Stage, manifest: ModelManifest) -> Any:
    """The source pipeline."""
    with stage.units.scratch() as folder:
        return source_pipeline(manifest, stage["compute"], stage["sampling"], folder)


if __name__ == "__main__":
    main(trajectories)
