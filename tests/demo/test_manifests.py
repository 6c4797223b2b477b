"""The committed manifests are valid, balanced and disjoint."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from demo_model.clips import CAMERAS, DIRECTIONS
from demo_model.manifests import draw_balanced, write_manifest
from demo_model.settings import AssetSettings, ClipSettings, load_section
from demo_model.sprites import Assets
from PIL import Image

REQUIRED = {"id", "split", "prompt", "negative_prompt", "image", "seed", "source", "license"}


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=["calibration", "evaluation"])
def folder(request, data_folder: Path) -> Path:
    return data_folder / request.param


def test_rows_are_complete_and_images_are_there(folder: Path):
    rows = read(folder)
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() >= REQUIRED
        assert re.fullmatch("[A-Za-z0-9_]+", row["id"])
        assert row["image"] == f"images/{row['id']}.png"
        with Image.open(folder / row["image"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")


def test_prompts_say_what_extra_says(folder: Path):
    for row in read(folder):
        extra = row["extra"]
        assert row["prompt"].endswith(f"{extra['sprite']} moving {extra['direction']}, {extra['camera']}")


@pytest.mark.parametrize("length", [4, 8, 16])
def test_any_prefix_is_balanced(folder: Path, length: int):
    rows = read(folder)[:length]
    for key, names in (("direction", DIRECTIONS), ("camera", CAMERAS)):
        counts = Counter(row["extra"][key] for row in rows)
        assert max(counts.values()) - min(counts.get(name, 0) for name in names) <= 1


def test_splits_are_as_many_as_promised(data_folder: Path):
    assert Counter(row["split"] for row in read(data_folder / "calibration")) == {
        "calibration": 10,
        "validation": 2,
        "heldout": 4,
    }
    assert Counter(row["split"] for row in read(data_folder / "evaluation")) == {"evaluation": 40}


def test_evaluation_shares_no_sprite_and_no_photo(data_folder: Path):
    settings = load_section(data_folder / "training" / "params.yaml", "assets", AssetSettings)
    calibration, evaluation = (read(data_folder / name) for name in ("calibration", "evaluation"))
    for key in ("sprite", "photo"):
        assert not {row["extra"][key] for row in calibration} & {row["extra"][key] for row in evaluation}
    assert {row["extra"]["sprite"] for row in evaluation} <= set(settings.evaluation_sprites)
    assert not set(settings.photos["training"]) & set(settings.photos["evaluation"])


def test_splits_of_calibration_share_no_picture(data_folder: Path):
    rows = read(data_folder / "calibration")
    for key in ("sprite", "photo"):
        used = {
            split: {row["extra"][key] for row in rows if row["split"] == split}
            for split in ("calibration", "validation", "heldout")
        }
        assert not used["calibration"] & used["heldout"]
        assert not used["validation"] & (used["calibration"] | used["heldout"])


def test_writing_a_manifest_is_deterministic(assets: Assets, clip_settings: ClipSettings, tmp_path: Path):
    licences = dict.fromkeys(assets.photos, "CC0-1.0 (photo by nobody)")
    for name in ("one", "two"):
        specs = draw_balanced(9, 5, assets, "training", clip_settings)
        write_manifest(tmp_path / name, "row", ["evaluation"] * 5, specs, assets, clip_settings, licences)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
