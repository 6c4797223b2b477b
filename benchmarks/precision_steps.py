"""A precision schedule under another number of sampler steps than it was made for.

    python benchmarks/precision_steps.py

Runs the pipeline up to the packed variant `full` and the sensitivity in a copy of this checkout (10 steps). Makes the
schedule for 10 steps and for each other number of steps, from the same sensitivity. Samples videos with both and with
4-bit activations alone, on evaluation prompts that precision_budget.py does not use (30 to 37). Prints the mean squared
error against BF16 with as many steps, as a multiple of that of 4-bit activations alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.batch_sampling import Prepared, decoded
from benchmarks.precision_settings import PACKED, Slots, on_finished_run, pipeline, share, unused_prompts, with_slots
from stepquant.calibration.schedule import make_schedule
from stepquant.calibration.sensitivity_files import read_products
from stepquant.models.configs import SCHEDULER, read_config
from stepquant.models.manifest import read_manifest
from stepquant.params import section
from stepquant.recipe.schedule_file import Schedule

STEPS = (4, 10, 20)
PROMPTS = 8  # of those that precision_budget.py does not use


def compare(root: Path, scratch: Path) -> None:
    """Print the table of a finished run."""
    params, manifest = root / "params.yaml", read_manifest(root / "artifacts/model/manifest.json")
    made_for = section(params, "sampling")
    products = {name: read_products(root / "artifacts/sensitivity" / name) for name in manifest.experts}
    scheduler = read_config(root / manifest.source / SCHEDULER)
    prompts = unused_prompts(root)[:PROMPTS]

    def schedule(steps: int) -> Schedule:
        sampling = made_for.model_copy(update={"steps": steps})
        return make_schedule(
            manifest, scheduler, sampling, section(params, "format"), section(params, "precision"), products
        )

    print(
        f"| steps | made for {made_for.steps} steps | share | made for as many steps | share |\n|---|---|---|---|---|"
    )
    for steps in STEPS:
        sampling = made_for.model_copy(update={"steps": steps})
        source = pipeline(root / manifest.source, sampling)
        prepared = Prepared.of(source, sampling, prompts)
        bf16, own = decoded(source, prepared.sample(source)), schedule(steps)
        errors = []
        chosen: list[Slots] = [{}, _slots(schedule(made_for.steps)), _slots(own)]
        for n, slots in enumerate(chosen):
            folder = with_slots(root / PACKED, scratch / f"{steps}-{n}", manifest, own, slots)
            frames = decoded(source, prepared.sample(pipeline(folder, sampling)))
            errors.append((frames - bf16).square().mean().item())
        found = [f"{error / errors[0]:.2f} | {share(own, slots):.0%}" for error, slots in zip(errors[1:], chosen[1:])]
        print(f"| {steps} | {' | '.join(found)} |", flush=True)


def _slots(schedule: Schedule) -> Slots:
    return {name: expert.eight_bit for name, expert in schedule.experts.items()}


if __name__ == "__main__":
    on_finished_run(compare, __doc__)
