"""The report's figures, one per question, as SVG text.

The same input gives the same bytes: ids come from a fixed salt, and no date is written. Text is stored as text, so that
it can be selected, searched and read aloud. The colors are those of Okabe and Ito, which color-blind readers can
distinguish; every variant has its own marker as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stepquant.evaluate.metrics_file import Record
from stepquant.recipe.schedule_file import Schedule
from stepquant.report.tables import experts

STYLE = {
    "svg.hashsalt": "stepquant",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": [
        "DejaVu Sans",
        "Verdana",
    ],  # matplotlib includes the first, so every machine has the same layout
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
WIDTH = 6.6  # inches


@dataclass(frozen=True)
class ClipRatio:
    """The result of the clipping search for one site of one block in one bin.

    Attributes:
        expert: Name of the expert.
        block: Index of the transformer block.
        site: Name of the site.
        bin: Index of the timestep bin; None if one clip serves all t.
        ratio: The factor on the dynamic activation scale; for mxfp4 it includes 2^exponent_offset.
    """

    expert: str
    block: int
    site: str
    bin: int | None
    ratio: float


@mpl.rc_context(STYLE)
def error_by_bin(records: Sequence[Record]) -> str:
    """Layer error along the denoising trajectory: a panel per expert, a line per variant; bin 0 is the noisiest."""
    figure, panels = _panels(experts(records), height=3.4)
    looks = _looks(records)
    for expert, axes in panels.items():
        for record in _quantized(records, expert):
            errors = [np.nan if error is None else error for error in record.layers[expert].bins]
            axes.plot(range(len(errors)), errors, label=record.variant, markersize=5, **looks[record.variant])
        axes.set(title=expert, xlabel="timestep bin (0 is the noisiest)")
        axes.xaxis.set_major_locator(_integers())
    return _finish(figure, panels, "relative layer error")


@mpl.rc_context(STYLE)
def error_by_site(records: Sequence[Record]) -> str:
    """Layer error by site: a panel per expert, a row per site, a marker per variant."""
    figure, panels = _panels(experts(records), height=3.8)
    looks = _looks(records)
    sites = sorted({site for record in records for layers in record.layers.values() for site in layers.sites})
    for expert, axes in panels.items():
        for record in _quantized(records, expert):
            errors = record.layers[expert].sites
            rows = [row for row, site in enumerate(sites) if site in errors]
            axes.plot(
                [errors[sites[row]] for row in rows], rows, linestyle="", label=record.variant, **looks[record.variant]
            )
        axes.set(title=expert, xlabel="relative layer error", yticks=range(len(sites)), yticklabels=sites)
        axes.set_ylim(len(sites) - 0.5, -0.5)  # the first site on top
    return _finish(figure, panels, "")


@mpl.rc_context(STYLE)
def psnr_by_variant(records: Sequence[Record]) -> str:
    """Distance of the videos to BF16: a marker per variant with its bootstrap interval, a faint dot per video."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.4 * len(records)), layout="constrained")
    axes = figure.subplots()
    looks = _looks(records)
    compared = [(record, record.videos.psnr) for record in records if record.videos.psnr]
    for row, (record, estimate) in enumerate(compared):
        color = looks[record.variant]["color"]
        values = [video.psnr for video in record.videos.per_video.values() if video.psnr is not None]
        axes.plot(values, [row] * len(values), ".", color=color, alpha=0.3)
        axes.plot([estimate.low, estimate.high], [row, row], color=color, linewidth=2.5, solid_capstyle="butt")
        axes.plot(estimate.mean, row, markersize=7, **looks[record.variant])
    axes.set(xlabel="PSNR against the BF16 video, dB", ylim=(len(compared) - 0.5, -0.5))
    axes.set_yticks(range(len(compared)), [record.variant for record, _ in compared])
    return _svg(figure)


@mpl.rc_context(STYLE)
def psnr_by_frame(records: Sequence[Record]) -> str:
    """Distance to BF16 along the video: the mean PSNR of every frame, a line per variant."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    looks = _looks(records)
    for record in (record for record in records if record.videos.psnr):
        frames = np.mean([video.psnr_frames or [] for video in record.videos.per_video.values()], axis=0)
        axes.plot(range(len(frames)), frames, label=record.variant, markersize=4, **looks[record.variant])
    axes.set(xlabel="frame", ylabel="PSNR against the BF16 video, dB")
    axes.xaxis.set_major_locator(_integers())
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


@mpl.rc_context(STYLE)
def clip_table(ratios: Sequence[ClipRatio]) -> str:
    """Results of the clipping search: a panel per expert, sites by bins, the mean ratio over the blocks."""
    names = sorted({ratio.expert for ratio in ratios})
    figure, panels = _panels(names, height=3.6)
    sites = sorted({ratio.site for ratio in ratios})
    low, high = min(ratio.ratio for ratio in ratios), max(ratio.ratio for ratio in ratios)
    for expert, axes in panels.items():
        table = _ratio_table([ratio for ratio in ratios if ratio.expert == expert], sites)
        axes.imshow(table, cmap="Blues_r", aspect="auto", vmin=low, vmax=high)
        for row, column in np.argwhere(np.isfinite(table)):
            ratio = table[row, column]
            ink = "white" if ratio < (low + high) / 2 else "black"
            axes.text(column, row, f"{ratio:.2f}", ha="center", va="center", fontsize=7, color=ink)
        axes.grid(False)
        axes.set(title=expert, xlabel="timestep bin (0 is the noisiest)", yticks=range(len(sites)), yticklabels=sites)
        axes.set_xticks(range(table.shape[1]))
    return _svg(figure)


@mpl.rc_context(STYLE)
def error_shares(schedule: Schedule) -> str:
    """Where rounded activations cost the video: a panel per expert, sites by bins, percent of the predicted error.

    Under the percentage stands in how many blocks the site takes 8-bit activations.
    """
    figure, panels = _panels(sorted(schedule.experts), height=3.6)
    narrow = {name: np.array(expert.errors["activations"]).sum(1).T for name, expert in schedule.experts.items()}
    total = sum(table.sum() for table in narrow.values())
    high = max(table.max() for table in narrow.values()) / total
    for name, axes in panels.items():
        expert, table = schedule.experts[name], narrow[name] / total
        axes.imshow(table, cmap="Reds", aspect="auto", vmin=0, vmax=high)
        for (row, column), share in np.ndenumerate(table):
            blocks = sum(column in expert.bins(block, expert.sites[row]) for block in range(expert.blocks))
            text = f"{share:.1%}" + f"\n{blocks}/{expert.blocks}" * bool(blocks)
            ink = "white" if share > high / 2 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
        axes.grid(False)
        axes.set(title=name, xlabel="timestep bin (0 is the noisiest)")
        axes.set(yticks=range(len(expert.sites)), yticklabels=expert.sites, xticks=range(table.shape[1]))
    return _svg(figure)


def _ratio_table(ratios: Sequence[ClipRatio], sites: Sequence[str]) -> np.ndarray:
    """Mean ratio over blocks, [sites, bins], NaN where there is none. A site with one clip has it in every bin."""
    bins = 1 + max((ratio.bin for ratio in ratios if ratio.bin is not None), default=0)
    table = np.full((len(sites), bins), np.nan)
    for (row, column), _ in np.ndenumerate(table):
        chosen = [r.ratio for r in ratios if r.site == sites[row] and r.bin in (column, None)]
        if chosen:
            table[row, column] = np.mean(chosen)
    return table


def _integers() -> MaxNLocator:
    """Ticks at whole numbers, with the steps of matplotlib's default."""
    return MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True)


def _quantized(records: Sequence[Record], expert: str) -> list[Record]:
    return [record for record in records if expert in record.layers]


def _looks(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Color and marker of each quantized variant, the same in every figure."""
    variants = [record.variant for record in records if record.format]
    return {
        variant: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, variant in enumerate(variants)
    }


def _panels(names: Sequence[str], height: float) -> tuple[Figure, dict[str, Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, dict(zip(names, figure.subplots(1, len(names), sharey=True, squeeze=False)[0]))


def _finish(figure: Figure, panels: dict[str, Axes], ylabel: str) -> str:
    first = next(iter(panels.values()))
    first.set_ylabel(ylabel)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return text.getvalue()
