"""The report: one self-contained HTML page, and its figures once more as SVG files.

The page carries its pictures inside and refers to nothing outside, so it opens offline, mails well and stays readable.
The same input gives the same bytes. What the page says stands in page.html.j2, what it shows is gathered here.
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
from stepquant.recipe.variants import DESCRIPTIONS
from stepquant.report import plots
from stepquant.report.tables import experts, layer_tables, summary_table
from stepquant.storage.atomic import finished_or_absent

GALLERY_WIDTH = 240  # pixels; larger videos are reduced to it, smaller ones are enlarged by the browser


@dataclass(frozen=True)
class GalleryRow:
    """One prompt: the input image (uint8 [H, W, 3]) and what each variant made of it ({variant: uint8 [F, H, W, 3]})."""

    sample: str
    prompt: str
    image: np.ndarray
    videos: Mapping[str, np.ndarray]


def write_report(
    out_dir: Path,
    records: Sequence[Record],
    gallery: Sequence[GalleryRow],
    fps: int,
    title: str,
    model: str,
    params: Mapping[str, Any],
    clips: Sequence[plots.ClipRatio],
) -> Path:
    """Writes out_dir/index.html and out_dir/plots/*.svg and returns the path of the page.

    records: one per variant, in the order to show them. gallery: the prompts to show, with a video of every variant, at
    fps frames per second. model: the source model as the user named it. params: what the run was made with, shown as
    given; sections may nest. clips: what the clip search chose, empty if nothing was clipped.
    Raises UserError if there is no record, a variant comes twice, or a gallery row has not exactly the records' variants.
    """
    variants = [record.variant for record in records]
    _check(variants, gallery)
    figures = draw_figures(records, clips)
    for name, svg in figures.items():
        _write(out_dir / "plots" / f"{name}.svg", svg)
    page = _template().render(
        title=title,
        model=model,
        explained=DESCRIPTIONS,
        gallery_width=GALLERY_WIDTH,
        summary=summary_table(records),
        count=records[0].videos.count,
        variants=variants,
        gallery=[_pictures(row, variants, fps) for row in gallery],
        figures={name: _data_uri("image/svg+xml", svg.encode()) for name, svg in figures.items()},
        layers={expert: layer_tables(records, expert) for expert in experts(records)},
        params=dict(_flat(params)),
    )
    _write(out_dir / "index.html", page)
    return out_dir / "index.html"


def draw_figures(records: Sequence[Record], clips: Sequence[plots.ClipRatio]) -> dict[str, str]:
    """Every figure that there is something to show in, as {name: SVG}."""
    figures = {}
    if any(record.videos.psnr for record in records):
        figures |= {"psnr_by_variant": plots.psnr_by_variant(records), "psnr_by_frame": plots.psnr_by_frame(records)}
    if experts(records):
        figures |= {"error_by_bin": plots.error_by_bin(records), "error_by_site": plots.error_by_site(records)}
    if clips:
        figures["clip_table"] = plots.clip_table(clips)
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
    image = BytesIO()
    Image.fromarray(row.image).save(image, "PNG")
    gifs = {variant: encode_gif(_reduced(row.videos[variant]), fps) for variant in variants}
    return {
        "prompt": row.prompt,
        "image": _data_uri("image/png", image.getvalue()),
        "gifs": {variant: _data_uri("image/gif", gif) for variant, gif in gifs.items()},
    }


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


def _write(path: Path, text: str) -> None:
    with finished_or_absent(path) as partial:
        partial.write_text(text, encoding="utf-8")
