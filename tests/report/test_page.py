import base64
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from stepquant.errors import UserError
from stepquant.evaluate.layers import LayerError
from stepquant.evaluate.metrics_file import (
    FormatPair,
    Record,
    measure_video,
    memory,
    summarize_layers,
    summarize_videos,
)
from stepquant.evaluate.summary import Bootstrap
from stepquant.recipe.schedule_file import ExpertSchedule, Schedule
from stepquant.report.page import GALLERY_WIDTH, GalleryRow, ReportContents, write_report
from stepquant.report.plots import ClipRatio

VARIANTS = ("bf16", "rtn", "my_own")
BOOTSTRAP = Bootstrap(samples=50, confidence=0.9, seed=0)
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
VIDEOS = {variant: np.roll(IMAGE, i, axis=0)[None].repeat(3, axis=0) for i, variant in enumerate(VARIANTS)}
CLIPS = [ClipRatio("low_noise", 0, "ffn.up", 0, 0.9)]
SCHEDULE = Schedule(
    eight_bit_format="int8",
    budget=0.2,
    share=0.125,
    experts={
        "low_noise": ExpertSchedule(
            bin_edges=[900.0, 500.0, 0.0],
            sites=["attn1.qkv", "ffn.up"],
            eight_bit={1: {"ffn.up": [1]}},
            errors={
                "activations": [[[1.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 4.0]]],
                "activations_8_bit": [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.5]]],
                "weights": [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]],
            },
            cost=[[1.0, 1.0], [1.0, 1.0]],
        )
    },
)
PARAMS = {
    "format": {"weight": "int4", "activation": "int4"},
    "clip": {"ratios": [0.8, 1.0]},
    "model": {"revision": None},
}
VOID = {"meta", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """Collects tags with attributes and the text, and fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def record(variant: str) -> Record:
    bf16 = {"a": measure_video(VIDEOS["bf16"], None, IMAGE)}
    quantized = variant != "bf16"
    videos = {"a": measure_video(VIDEOS[variant], VIDEOS["bf16"], IMAGE)} if quantized else bf16
    return Record(
        variant=variant,
        format=FormatPair(weight="int4", activation="int4") if quantized else None,
        videos=summarize_videos(videos, bf16 if quantized else None, BOOTSTRAP),
        layers=summarize_layers([LayerError("low_noise", 0, "ffn.up", 0, 0.25)] if quantized else []),
        memory=memory(100 if quantized else 400, 400),
    )


def row(**changes) -> GalleryRow:
    return GalleryRow(**{"sample": "a", "prompt": "a <b>bold</b> crab", "image": IMAGE, "videos": VIDEOS} | changes)


def write(out_dir, **changes):
    given = {
        "records": [record(variant) for variant in VARIANTS],
        "gallery": [row()],
        "fps": 8,
        "title": "Wan & friends",
        "model": "data/models/mini",
        "params": PARAMS,
        "clips": CLIPS,
        "schedule": SCHEDULE,
    }
    return write_report(out_dir, ReportContents(**given | changes))


def test_the_page_shows_every_variant_everywhere(tmp_path):
    page = Page(write(tmp_path).read_text())
    heads = [text for text in page.text if text in VARIANTS]
    assert all(heads.count(variant) >= 3 for variant in VARIANTS)  # summary, explanation, gallery
    assert {f"Video by {variant}: a <b>bold</b> crab" for variant in VARIANTS} <= {
        img["alt"] for img in page.all("img")
    }
    said = "".join(page.text)
    assert all(
        word in said
        for word in ("Wan & friends", "data/models/mini", "a <b>bold</b> crab", "python -m stages.evaluate")
    )
    assert all(key in said for key in ("format.weight", "clip.ratios", "0.8, 1.0", "model.revision"))


def test_everything_is_in_the_page(tmp_path):
    text = write(tmp_path).read_text()
    page = Page(text)
    references = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "data", "srcset") if name in attrs]
    assert references and all(reference.startswith(("data:", "#")) for reference in references)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert {reference[1:] for reference in references if reference.startswith("#")} <= set(ids)
    assert len(ids) == len(set(ids))


def test_pictures_are_what_was_given(tmp_path):
    page = Page(write(tmp_path).read_text())
    images = {attrs["alt"]: attrs["src"] for attrs in page.all("img")}

    def opened(alt: str) -> Image.Image:
        return Image.open(BytesIO(base64.b64decode(images[alt].split(",")[1])))

    np.testing.assert_array_equal(np.asarray(opened("Input image: a <b>bold</b> crab").convert("RGB")), IMAGE)
    with opened("Video by rtn: a <b>bold</b> crab") as gif:
        assert (gif.format, gif.size) == ("GIF", (16, 16))


def test_large_videos_are_reduced(tmp_path):
    large = np.zeros((2, 8, 2 * GALLERY_WIDTH, 3), np.uint8)
    page = Page(write(tmp_path, gallery=[row(videos=dict.fromkeys(VARIANTS, large))]).read_text())
    source = next(attrs["src"] for attrs in page.all("img") if attrs["alt"].startswith("Video by rtn"))
    assert Image.open(BytesIO(base64.b64decode(source.split(",")[1]))).size == (GALLERY_WIDTH, 4)


def test_tables_and_pictures_are_accessible(tmp_path):
    page = Page(write(tmp_path).read_text())
    assert page.all("html") == [{"lang": "en"}]
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_written_twice_it_is_the_same_bytes(tmp_path):
    files = [sorted(p for p in (write(tmp_path / name).parent).rglob("*") if p.is_file()) for name in ("a", "b")]
    assert [p.relative_to(tmp_path / "a") for p in files[0]] == [p.relative_to(tmp_path / "b") for p in files[1]]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    assert {p.name for p in files[0]} == {
        "index.html",
        *(
            f"{name}.svg"
            for name in (
                "psnr_by_variant",
                "psnr_by_frame",
                "error_by_bin",
                "error_by_site",
                "error_shares",
                "clip_table",
            )
        ),
    }


def test_a_report_on_bf16_alone_has_no_empty_figure(tmp_path):
    page = Page(write(tmp_path, records=[record("bf16")], gallery=[], clips=[], schedule=None).read_text())
    assert page.all("img") == []
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"records": []}, "no metrics"),
        ({"records": [record("rtn"), record("rtn")]}, "twice: rtn, rtn"),
        ({"gallery": [row(videos={"rtn": VIDEOS["rtn"]})]}, "'a' has videos of rtn; expected .* bf16, rtn, my_own"),
        ({"gallery": [row(videos=VIDEOS | {"other": IMAGE})]}, "'a' has videos of bf16, my_own, other, rtn"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_shares_of_the_predicted_error(tmp_path):
    """8.0 in all: in the second bin 1 of attn1.qkv, and 6 of ffn.up, one of whose two blocks takes 8 bits."""
    write(tmp_path)
    svg = (tmp_path / "plots/error_shares.svg").read_text()
    found = re.findall(r"<text [^>]*>([^<]*)</text>", svg)
    assert [text for text in found if text in ("12.5%", "75.0%", "0.0%", "1/2")].count("12.5%") == 2
    assert {"75.0%", "0.0%", "1/2"} <= set(found)
