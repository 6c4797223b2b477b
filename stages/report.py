"""report: one page over all variants, and the numbers that DVC compares."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, Place, open_stage
from stepquant.command_runner import command, main
from stepquant.evaluate.metrics_file import read_records
from stepquant.evaluate.video import write_preview
from stepquant.models.manifest import read_manifest
from stepquant.models.prompts import evaluation_prompts
from stepquant.params import SECTIONS, read_params
from stepquant.recipe.schedule_file import read_schedule
from stepquant.report.contents import clip_ratios, gallery_rows, headline
from stepquant.report.page import ReportContents, write_report
from stepquant.storage.atomic import finished_folder_or_absent, write_text
from stepquant.storage.json_files import to_json

READS = tuple(SECTIONS)
GALLERY_ROWS = 6
PREVIEW_ROWS = 3
PREVIEW_WIDTH = 128


@command
def report(
    params: ParamsFile = Path("params.yaml"),
    variant: Annotated[
        list[str] | None, typer.Option(help="Show this variant only; can be repeated. Without it, all that were made.")
    ] = None,
) -> None:
    """Gather all variants into one page, and write the numbers that `dvc metrics` shows.

    Reads all params (the page shows them), and the artifacts model, metrics, videos, clip and schedule.json.
    Writes artifacts/report/ (index.html, plots, preview.gif) and metrics.json.
    """
    with open_stage(__file__, READS, params, device=Place.NOWHERE) as stage:
        manifest, records = read_manifest(artifacts.MODEL), read_records(artifacts.METRICS, variant)
        prompts, variants = evaluation_prompts(stage["generate"]), [record.variant for record in records]
        contents = ReportContents(
            title=stage["report"].title,
            model=manifest.source,
            records=records,
            gallery=gallery_rows(prompts[:GALLERY_ROWS], variants, artifacts.video),
            fps=stage["generate"].fps,
            clips=clip_ratios(manifest, artifacts.clip),
            schedule=read_schedule(artifacts.SCHEDULE) if artifacts.SCHEDULE.exists() else None,
            params=read_params(params),
        )
        rows = contents.gallery[:PREVIEW_ROWS]
        columns = [np.concatenate([row.videos[variant] for row in rows], axis=1) for variant in variants]
        with finished_folder_or_absent(artifacts.REPORT) as folder:
            write_report(folder, contents)
            write_preview(folder / "preview.gif", columns, variants, contents.fps, PREVIEW_WIDTH)
        write_text(artifacts.HEADLINES, to_json({record.variant: headline(record) for record in records}))


if __name__ == "__main__":
    main(report)
