"""report: one page over all variants, and the numbers that DVC compares."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, Place, open_stage
from stepquant.calibration.statistics_files import block_name
from stepquant.command_runner import command, main
from stepquant.evaluate.metrics_file import Record, read_records
from stepquant.evaluate.video import read_video, write_preview
from stepquant.models.manifest import ModelManifest, read_manifest
from stepquant.models.prompts import evaluation_prompts
from stepquant.models.sites import WAN_SITES
from stepquant.params import SECTIONS, read_params
from stepquant.recipe.site_files import ClipTable
from stepquant.report.page import GalleryRow, write_report
from stepquant.report.plots import ClipRatio
from stepquant.storage.atomic import write_text
from stepquant.storage.json_files import to_json

READS = tuple(SECTIONS)
GALLERY_ROWS = 6
PREVIEW_ROWS = 3
PREVIEW_WIDTH = 128


@command
def report(params: ParamsFile = Path("params.yaml")) -> None:
    """Gather all variants into one page, and write the numbers that `dvc metrics` shows.

    Reads all params (the page shows them), and the artifacts model, metrics, videos and clip.
    Writes artifacts/report/ (index.html, plots, preview.gif) and metrics.json.
    """
    with open_stage(__file__, READS, params, device=Place.NOWHERE) as stage:
        manifest = read_manifest(artifacts.MODEL)
        records = read_records(artifacts.METRICS)
        variants = [record.variant for record in records]
        gallery = gallery_rows(stage["generate"], variants)
        fps = stage["generate"].fps
        partial = artifacts.REPORT.with_name(f".{artifacts.REPORT.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        write_report(
            partial,
            records,
            gallery,
            fps,
            stage["report"].title,
            manifest.source,
            read_params(params),
            clip_ratios(manifest),
        )
        columns = [
            np.concatenate([row.videos[variant] for row in gallery[:PREVIEW_ROWS]], axis=1) for variant in variants
        ]
        write_preview(partial / "preview.gif", columns, variants, fps, PREVIEW_WIDTH)
        shutil.rmtree(artifacts.REPORT, ignore_errors=True)
        partial.rename(artifacts.REPORT)
        write_text(artifacts.HEADLINES, to_json({record.variant: headline(record) for record in records}))


def gallery_rows(settings: Any, variants: list[str]) -> list[GalleryRow]:
    """The first prompts with the video of every variant."""
    rows = []
    for prompt in evaluation_prompts(settings)[:GALLERY_ROWS]:
        videos = {variant: read_video(artifacts.video(variant, prompt.id)) for variant in variants}
        rows.append(GalleryRow(prompt.id, prompt.prompt, np.asarray(prompt.load_image()), videos))
    return rows


def clip_ratios(manifest: ModelManifest) -> list[ClipRatio]:
    """What the clip search chose, per site, block and bin."""
    chosen = []
    for expert, described in manifest.experts.items():
        for index in range(described.blocks):
            for site in WAN_SITES:
                table = ClipTable.from_file(artifacts.clip(expert) / block_name(index), site.name, "cpu")
                ratios = (table.ratio * table.exponent.float().exp2()).tolist()
                bins = range(len(ratios)) if site.depends_on_timestep else [None]
                chosen += [ClipRatio(expert, index, site.name, b, ratio) for b, ratio in zip(bins, ratios)]
    return chosen


def headline(record: Record) -> dict[str, Any]:
    """The few numbers of a variant that tell whether a change made it better."""
    videos = record.videos
    return {
        "psnr": videos.psnr and videos.psnr.mean,
        "ssim": videos.ssim and videos.ssim.mean,
        "first_frame_psnr": videos.first_frame_psnr.mean,
        "layer_error": {expert: layers.mean for expert, layers in record.layers.items()},
        "size_ratio": record.memory.ratio,
    }


if __name__ == "__main__":
    main(report)
