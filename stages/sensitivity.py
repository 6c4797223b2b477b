"""sensitivity@E: what the rounding errors of each site do to the denoiser's output, from recorded calls."""

from pathlib import Path

from stages import _artifacts as artifacts
from stages._stage import Expert, ParamsFile, Place, described_model, open_stage
from stepquant.calibration.sensitivity import StepSensitivity
from stepquant.calibration.sensitivity_files import manifest_text, measured_steps
from stepquant.calibration.step_gradients import Probes
from stepquant.calibration.trajectories import Trajectories
from stepquant.command_runner import command, main
from stepquant.compute.progress import meter
from stepquant.compute.task import Task
from stepquant.compute.units import gather
from stepquant.models.bins import expert_bins
from stepquant.models.sampling import guidance
from stepquant.recipe.shapes import check_eight_bits
from stepquant.storage.json_files import read_json

READS = ("compute", "sampling", "bins", "format", "sensitivity")


@command
def sensitivity(expert: Expert, params: ParamsFile = Path("params.yaml")) -> None:
    """Measure what the rounding errors of each site do to the output of one expert, per timestep bin.

    Reads the params sections compute, sampling, bins (this expert's), format and sensitivity, artifacts/model,
    artifacts/trajectories.zarr, artifacts/lowrank/EXPERT/, artifacts/residual/EXPERT/ and artifacts/clip/EXPERT/.
    Writes artifacts/sensitivity/EXPERT/.
    """
    with open_stage(__file__, READS, params, expert=expert, device=Place.WORKERS) as stage:
        manifest, settings, trajectories = described_model(), stage["sensitivity"], Trajectories(artifacts.TRAJECTORIES)
        sources = {
            "lowrank": artifacts.lowrank(expert),
            "residual": artifacts.residual(expert),
            "clip": artifacts.clip(expert),
        }
        check_eight_bits(manifest, expert, stage["format"])
        bins = expert_bins(stage["bins"].by_expert, expert, manifest.expert(expert).t_range)
        steps = measured_steps(trajectories.calls(expert), bins, settings)
        scale = guidance(stage["sampling"], list(manifest.experts).index(expert))
        inputs = {name: read_json(folder / "manifest.json")["blocks"] for name, folder in sources.items()}
        inputs |= {"model": manifest.expert_digest(expert), "trajectories": trajectories.digest(), "bins": bins.edges}
        tasks = {}
        for step in steps:
            probes = Probes(settings.probes, f"{settings.seed}/{step.prompt}", scale)
            common = (expert, manifest, artifacts.TRAJECTORIES, stage["compute"], stage["format"], sources)
            work = StepSensitivity(*common, step.calls, step.bin, probes)
            tasks[step.name] = Task(stage.key(step=step.name, **inputs), work)
        with stage.executor() as executor, meter(f"{stage.name}@{expert}", len(tasks)) as progress:
            units = dict(zip(tasks, executor.map_units(stage.units, list(tasks.values()), progress)))
        gather(units, artifacts.sensitivity(expert), {"manifest.json": manifest_text(steps, bins)})


if __name__ == "__main__":
    main(sensitivity)
