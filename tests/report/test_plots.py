import xml.etree.ElementTree as ElementTree

import pytest

from stepquant.evaluate.layers import LayerError
from stepquant.evaluate.metrics_file import FormatPair, Record, VideoMetrics, memory, summarize_layers, summarize_videos
from stepquant.evaluate.summary import Bootstrap
from stepquant.report import plots
from stepquant.report.plots import ClipRatio

BOOTSTRAP = Bootstrap(samples=50, confidence=0.9, seed=0)
CLIPS = [
    ClipRatio("high_noise", 0, "ffn.up", 0, 0.5),
    ClipRatio("high_noise", 1, "ffn.up", 0, 0.7),
    ClipRatio("high_noise", 0, "ffn.up", 1, 0.9),
    ClipRatio("high_noise", 1, "ffn.up", 1, 0.9),
    ClipRatio("high_noise", 0, "attn2.kv", None, 0.8),
    ClipRatio("low_noise", 0, "ffn.up", 0, 1.0),
]


def metrics(psnr: float | None) -> VideoMetrics:
    frames = psnr and [psnr, psnr - 1]
    return VideoMetrics(
        psnr=psnr, psnr_frames=frames, ssim=psnr and 0.9, first_frame_psnr=30, temporal_flickering=0.9, motion=5
    )


def record(variant: str, psnr: float | None) -> Record:
    bf16 = {"a": metrics(None), "b": metrics(None)}
    videos = bf16 if psnr is None else {"a": metrics(psnr), "b": metrics(psnr + 2)}
    error = 0.0 if psnr is None else 1 / psnr
    errors = [
        LayerError(expert, 0, site, None if site == "attn2.kv" else i, error)
        for expert in ("high_noise", "low_noise")
        for site in ("attn2.kv", "ffn.up")
        for i in range(2)
    ]
    return Record(
        variant=variant,
        format=psnr and FormatPair(weight="int4", activation="int4"),
        videos=summarize_videos(videos, psnr and bf16, BOOTSTRAP),
        layers=summarize_layers(errors if psnr else []),
        memory=memory(1, 4),
    )


RECORDS = [record("bf16", None), record("rtn", 20.0), record("full", 30.0)]
FIGURES = {
    "error_by_bin": (lambda: plots.error_by_bin(RECORDS), ["high_noise", "low_noise", "rtn", "full"]),
    "error_by_site": (
        lambda: plots.error_by_site(RECORDS),
        ["high_noise", "low_noise", "attn2.kv", "ffn.up", "rtn", "full"],
    ),
    "psnr_by_variant": (lambda: plots.psnr_by_variant(RECORDS), ["rtn", "full"]),
    "psnr_by_frame": (lambda: plots.psnr_by_frame(RECORDS), ["rtn", "full", "frame"]),
    "clip_table": (lambda: plots.clip_table(CLIPS), ["high_noise", "low_noise", "attn2.kv", "ffn.up"]),
}


def texts(svg: str) -> list[str]:
    return [node.text.strip() for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_svg_that_names_what_it_shows(name):
    draw, expected = FIGURES[name]
    assert set(expected) <= set(texts(draw()))
    assert "bf16" not in texts(draw())  # the reference has neither error nor PSNR


@pytest.mark.parametrize("name", FIGURES)
def test_drawn_twice_they_are_the_same_bytes(name):
    draw, _ = FIGURES[name]
    assert draw() == draw()
    assert "dc:date" not in draw()


def test_the_clip_table_shows_means_over_blocks():
    shown = texts(plots.clip_table(CLIPS))
    assert shown.count("0.60") == 1  # (0.5 + 0.7) / 2 in bin 0
    assert shown.count("0.90") == 1  # bin 1
    assert shown.count("0.80") == 2  # one clip for all t stands in both bins
    assert shown.count("1.00") == 1


def test_one_denoiser_and_one_variant_are_enough():
    one = record("full", 30.0)
    dense = one.model_copy(update={"layers": {"denoiser": one.layers["low_noise"]}})
    assert {"denoiser", "full"} <= set(texts(plots.error_by_bin([dense])))
    assert {"denoiser", "full"} <= set(texts(plots.error_by_site([dense])))


def test_a_variant_looks_the_same_in_every_figure():
    without_layers = RECORDS[1].model_copy(update={"layers": {}})
    records = [RECORDS[0], without_layers, RECORDS[2]]
    rtn, full = plots.COLORS[:2]
    assert rtn in plots.psnr_by_variant(records) and full in plots.psnr_by_variant(records)
    assert rtn not in plots.error_by_bin(records) and full in plots.error_by_bin(records)
