"""report: one page over all variants, and the numbers that DVC compares."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from stages import artifacts
from stages.common import ParamsFile, open_stage, read_json, to_json
from stepquant.calibration.activations import block_name
from stepquant.calibration.prompts import evaluation_prompts
from stepquant.commands import command, main
from stepquant.evaluate.records import Record, read_records
from stepquant.evaluate.video import read_video, write_preview
from stepquant.files import write_text
from stepquant.models.sites import WAN_SITES
from stepquant.params import SECTIONS, read_params
from stepquant.report.page import GalleryRow, write_report
from stepquant.report.plots import ClipRatio

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
    with open_stage(__file__, READS, params) as stage:
        manifest = read_json(artifacts.MODEL)
        records = read_records(artifacts.METRICS)
        variants = [record.variant for record in records]
        gallery = gallery_rows(stage["generate"], variants)
        fps = stage["generate"].fps
        partial = artifacts.REPORT.with_name(f".{artifacts.REPORT.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        write_report(
            partial, records, gallery, fps, stage["report"].title, manifest["source"],
            read_params(params), clip_ratios(manifest),
        )
        columns = [np.concatenate([row.videos[variant] for row in gallery[:PREVIEW_ROWS]], axis=1) for variant in variants]
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


def clip_ratios(manifest: dict[str, Any]) -> list[ClipRatio]:
    """What the clip search chose, per site, block and bin."""
    chosen = []
    for expert, described in manifest["experts"].items():
        for index in range(described["blocks"]):
            with safe_open(artifacts.clip(expert) / block_name(index) / "factors.safetensors", framework="np") as file:
                for site in WAN_SITES:
                    ratios = file.get_tensor(f"{site.name}.ratio") * np.exp2(file.get_tensor(f"{site.name}.exponent").astype(np.float32))
                    bins = range(len(ratios)) if site.depends_on_timestep else [None]
                    chosen += [ClipRatio(expert, index, site.name, b, float(ratio)) for b, ratio in zip(bins, ratios)]
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
