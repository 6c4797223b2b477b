"""schedule: which slots take 8-bit activations, found under a budget from what their rounding does to the video."""

from pathlib import Path

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, Place, described_model, open_stage
from stepquant.calibration.schedule import make_schedule
from stepquant.calibration.sensitivity_files import read_products
from stepquant.command_runner import command, main
from stepquant.models.configs import SCHEDULER, read_config
from stepquant.models.source import resolve_source
from stepquant.recipe.schedule_file import write_schedule

READS = ("sampling", "format", "precision")


@command
def schedule(params: ParamsFile = Path("params.yaml")) -> None:
    """Spend the budget of 8-bit activations on the slots whose rounding errors reach the video most.

    Reads the params sections sampling, format and precision, artifacts/model and artifacts/sensitivity/. Writes
    artifacts/schedule.json.
    """
    with open_stage(__file__, READS, params, device=Place.NOWHERE) as stage:
        manifest = described_model()
        scheduler = read_config(resolve_source(manifest.source, manifest.revision) / SCHEDULER)
        products = {expert: read_products(artifacts.sensitivity(expert)) for expert in manifest.experts}
        found = make_schedule(manifest, scheduler, stage["sampling"], stage["format"], stage["precision"], products)
        write_schedule(artifacts.SCHEDULE, found)
        if stage["format"].eight_bit_activations:
            print(f"schedule: {found.eight_bit_format} activations have 8 bits in every bin: nothing to schedule")
            return
        print(f"schedule: {found.share:.1%} of the multiply-adds with {found.eight_bit_format} activations")


if __name__ == "__main__":
    main(schedule)
