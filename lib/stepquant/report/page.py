"""The report: one self-contained HTML page, with its figures as separate SVG files too.

The page contains its pictures and refers to nothing else, so it can be opened offline and sent by mail. The same input
gives the same bytes. page.html.j2 has the text of the page, and contents.py gathers what it shows.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from stepquant.errors import UserError
from stepquant.evaluate.metrics_file import Record
from stepquant.evaluate.video import encode_gif, fit_width
from stepquant.recipe.schedule_file import Schedule
from stepquant.recipe.variants import DESCRIPTIONS
from stepquant.report import plots
from stepquant.report.tables import experts, layer_tables, summary_table
from stepquant.storage.atomic import write_text

GALLERY_WIDTH = 240  # pixels; larger videos are reduced to it, and the browser enlarges smaller ones


@dataclass(frozen=True)
class GalleryRow:
    """One prompt in the gallery.

    Attributes:
        sample: The id of the prompt.
        prompt: Its text.
        image: The input image, uint8 [H, W, 3]; None for text-to-video.
        videos: Variant -> its video, uint8 [F, H, W, 3].
    """

    sample: str
    prompt: str
    image: np.ndarray | None
    videos: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ReportContents:
    """Everything that the page shows.

    Attributes:
        title: The title of the page.
        model: The source model as the user named it.
        records: One per variant, in the order to show them.
        gallery: The prompts to show, each with a video of every variant.
        fps: Frames per second of the videos.
        clips: What the clipping search chose; empty if nothing was clipped.
        schedule: The precision schedule; None if none was made.
        params: The parameters of the run, shown as given. Sections may nest.
    """

    title: str
    model: str
    records: Sequence[Record]
    gallery: Sequence[GalleryRow]
    fps: int
    clips: Sequence[plots.ClipRatio]
    schedule: Schedule | None
    params: Mapping[str, Any]


def write_report(out_dir: Path, contents: ReportContents) -> Path:
    """Write the page out_dir/index.html, and its figures once more as out_dir/plots/*.svg.

    Returns:
        The path of the page.

    Raises:
        UserError: There is no record, two records have the same variant, or a gallery row has videos of other variants
            than the records.
    """
    records = contents.records
    variants = [record.variant for record in records]
    _check(variants, contents.gallery)
    figures = draw_figures(records, contents.clips, contents.schedule)
    for name, svg in figures.items():
        write_text(out_dir / "plots" / f"{name}.svg", svg)
    page = _template().render(
        title=contents.title,
        model=contents.model,
        explained=DESCRIPTIONS,
        gallery_width=GALLERY_WIDTH,
        summary=summary_table(records),
        count=records[0].videos.count,
        variants=variants,
        gallery=[_pictures(row, variants, contents.fps) for row in contents.gallery],
        figures={name: _data_uri("image/svg+xml", svg.encode()) for name, svg in figures.items()},
        layers={expert: layer_tables(records, expert) for expert in experts(records)},
        params=dict(_flat(contents.params)),
    )
    write_text(out_dir / "index.html", page)
    return out_dir / "index.html"


def draw_figures(
    records: Sequence[Record], clips: Sequence[plots.ClipRatio], schedule: Schedule | None
) -> dict[str, str]:
    """Every figure that is not empty: name -> SVG text."""
    figures: dict[str, str] = {}
    if any(record.videos.psnr for record in records):
        figures |= {"psnr_by_variant": plots.psnr_by_variant(records), "psnr_by_frame": plots.psnr_by_frame(records)}
    if experts(records):
        figures |= {"error_by_bin": plots.error_by_bin(records), "error_by_site": plots.error_by_site(records)}
    if clips:
        figures["clip_table"] = plots.clip_table(clips)
    if schedule is not None:
        figures["error_shares"] = plots.error_shares(schedule)
    return figures


def _check(variants: Sequence[str], gallery: Sequence[GalleryRow]) -> None:
    if not variants:
        raise UserError("report: no metrics given; stage evaluate writes one file per variant")
    if len(set(variants)) < len(variants):
        raise UserError(f"report: a variant has metrics twice: {', '.join(variants)}")
    for row in gallery:
        if row.videos.keys() != set(variants):
            raise UserError(
                f"report: sample '{row.sample}' has videos of {', '.join(sorted(row.videos)) or 'no variant'}; "
                f"expected one of each variant with metrics: {', '.join(variants)}"
            )


def _pictures(row: GalleryRow, variants: Sequence[str], fps: int) -> dict[str, Any]:
    gifs = {variant: encode_gif(_reduced(row.videos[variant]), fps) for variant in variants}
    return {
        "prompt": row.prompt,
        "image": None if row.image is None else _png(row.image),
        "gifs": {variant: _data_uri("image/gif", gif) for variant, gif in gifs.items()},
    }


def _png(image: np.ndarray) -> str:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return _data_uri("image/png", buffer.getvalue())


def _reduced(video: np.ndarray) -> np.ndarray:
    return fit_width(video, min(video.shape[2], GALLERY_WIDTH))


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested sections as (dotted key, value)."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _template() -> Template:
    return Environment(
        loader=PackageLoader("stepquant.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.j2")


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
