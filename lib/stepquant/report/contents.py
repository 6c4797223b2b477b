"""What the report shows, gathered from the artifacts of a run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepquant.calibration.statistics_files import block_name
from stepquant.evaluate.metrics_file import Record
from stepquant.evaluate.video import read_video
from stepquant.models.manifest import ModelManifest
from stepquant.models.prompts import Prompt
from stepquant.recipe.site_files import ClipTable
from stepquant.report.page import GalleryRow
from stepquant.report.plots import ClipRatio


def gallery_rows(
    prompts: Sequence[Prompt], variants: Sequence[str], video: Callable[[str, str], Path]
) -> list[GalleryRow]:
    """Each prompt with the video of every variant. video: the file of (variant, prompt id)."""
    rows = []
    for prompt in prompts:
        videos = {variant: read_video(video(variant, prompt.id)) for variant in variants}
        image = np.asarray(prompt.load_image()) if "image" in prompt.images else None
        rows.append(GalleryRow(prompt.id, prompt.prompt, image, videos))
    return rows


def clip_ratios(manifest: ModelManifest, folder: Callable[[str], Path]) -> list[ClipRatio]:
    """The results of the clipping search per site, block and bin. folder: where an expert's clip tables are."""
    chosen = []
    for expert, described in manifest.experts.items():
        for index in range(described.blocks):
            for site in described.ordered_sites:
                table = ClipTable.from_file(folder(expert) / block_name(index), site.name, "cpu")
                ratios = (table.ratio * table.exponent.float().exp2()).tolist()
                bins = range(len(ratios)) if site.depends_on_timestep else [None]
                chosen += [ClipRatio(expert, index, site.name, b, ratio) for b, ratio in zip(bins, ratios)]
    return chosen


def headline(record: Record) -> dict[str, Any]:
    """The few numbers of a variant that tell whether a change improved it; `dvc metrics` shows them."""
    videos = record.videos
    return {
        "psnr": videos.psnr and videos.psnr.mean,
        "ssim": videos.ssim and videos.ssim.mean,
        "first_frame_psnr": videos.first_frame_psnr and videos.first_frame_psnr.mean,
        "layer_error": {expert: layers.mean for expert, layers in record.layers.items()},
        "size_ratio": record.memory.ratio,
    }
