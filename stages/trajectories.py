"""trajectories: sample the calibration prompts with the source model and record what its experts were given."""

from pathlib import Path
from typing import Any

from stages import artifacts
from stages.common import ParamsFile, dtype_of, open_stage, quiet_libraries, read_json
from stepquant.calibration.arrays import group_metadata
from stepquant.calibration.prompts import Prompt, read_manifest, take
from stepquant.calibration.trajectories import recorded, write_trajectory
from stepquant.commands import command, main
from stepquant.compute.progress import track
from stepquant.compute.units import gather
from stepquant.models.sampling import sample, set_flow_shift
from stepquant.models.source import load_source_pipeline, resolve_source

READS = ("compute", "sampling", "trajectories")
SPLITS = ("calibration", "heldout")


@command
def trajectories(params: ParamsFile = Path("params.yaml")) -> None:
    """Sample the calibration prompts and record every call of a denoiser; the only stage that samples the source model.

    Reads the params sections compute, sampling and trajectories. Writes artifacts/trajectories.zarr.
    """
    with open_stage(__file__, READS, params) as stage:
        manifest = read_json(artifacts.MODEL)
        settings = stage["trajectories"]
        rows = read_manifest(Path(settings.manifest))
        counts = (settings.calibration_prompts, settings.heldout_prompts)
        prompts = [p for split, count in zip(SPLITS, counts) for p in take(rows, split, count, settings.manifest)]
        pipe = _Lazy(manifest, stage["compute"], stage["sampling"])
        units = {}
        for prompt in track(prompts, "trajectories"):
            key = stage.key(("compute", "sampling"), model=manifest["files"], prompt=prompt.digest())
            units[prompt.id] = stage.units.make(key, lambda folder: record(pipe.get(), stage["sampling"], prompt, folder))
        digests = {name: unit.digest for name, unit in units.items()}
        gather(units, artifacts.TRAJECTORIES, {"zarr.json": group_metadata({"prompts": digests})})


def record(pipe: Any, sampling: Any, prompt: Prompt, folder: Path) -> None:
    """Sample one prompt and write its trajectory."""
    experts = {"high_noise": pipe.transformer, "low_noise": pipe.transformer_2} if pipe.transformer_2 else {"denoiser": pipe.transformer}
    with recorded(experts) as calls:
        sample(pipe, sampling, prompt.prompt, prompt.negative_prompt, prompt.load_image(), prompt.seed, "latent")
    write_trajectory(folder, calls, pipe.transformer.config.out_channels, prompt.split, f"prompt {prompt.id}")


class _Lazy:
    """The source pipeline, loaded when the first prompt that has no finished unit needs it."""

    def __init__(self, manifest: dict[str, Any], compute: Any, sampling: Any):
        self._arguments = (manifest, compute, sampling)
        self._pipe = None

    def get(self) -> Any:
        if self._pipe is None:
            quiet_libraries()
            manifest, compute, sampling = self._arguments
            folder = resolve_source(manifest["source"], manifest["revision"])
            self._pipe = load_source_pipeline(folder, compute.device, dtype_of(compute.dtype))
            set_flow_shift(self._pipe, sampling.flow_shift)
        return self._pipe


if __name__ == "__main__":
    main(trajectories)
