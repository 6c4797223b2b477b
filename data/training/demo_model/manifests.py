"""Writes the calibration and evaluation manifests and their first frames.

Row i takes direction i mod 4 and camera i mod 7. As 4 and 7 share no factor, the rows walk through all 28 pairs, and
any prefix of a manifest is balanced over both.
"""

import csv
import json
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from demo_model.clips import CAMERAS, DIRECTIONS, ClipSpec, draw_spec, render_clip
from demo_model.settings import ClipSettings, ManifestSettings, load_section
from demo_model.sprites import Assets, load_assets

SPRITE_LICENCE = "Apache-2.0 (sprite)"


def read_photo_licences(path: Path) -> dict[str, str]:
    """Maps a photo's stem to "LICENCE (photo by AUTHOR)"."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {Path(row["file"]).stem: f"{row['licence']} (photo by {row['author']})" for row in rows}


def draw_balanced(seed: int, count: int, assets: Assets, split: str, clips: ClipSettings) -> list[ClipSpec]:
    """Draws `count` clips: directions, cameras, sprites and photos each in turn, everything else at random.

    Sprites and photos are walked in shuffled order, so none comes again before all have come.
    """
    random = np.random.default_rng(seed)
    sprites = random.permutation(assets.splits["sprites"][split]).tolist()
    photos = random.permutation(assets.splits["photos"][split]).tolist()
    directions, cameras = tuple(DIRECTIONS), tuple(CAMERAS)
    return [
        draw_spec(
            random,
            assets,
            split,
            clips,
            direction=directions[index % len(directions)],
            camera=cameras[index % len(cameras)],
            sprite=sprites[index % len(sprites)],
            # One further per round, or seven photos would each meet a single camera phrase for ever.
            photo=photos[(index + index // len(photos)) % len(photos)],
        )
        for index in range(count)
    ]


def manifest_row(identifier: str, split: str, seed: int, spec: ClipSpec, licences: dict[str, str]) -> dict:
    """One manifest row; `extra` carries what a measurement of the clip needs to know."""
    left, top = spec.sprite_corner
    return {
        "id": identifier,
        "split": split,
        "prompt": spec.caption,
        "negative_prompt": "",
        "image": f"images/{identifier}.png",
        "seed": seed,
        "source": f"procedural: sprite {spec.sprite!r} over photo {spec.photo!r}",
        "license": f"{SPRITE_LICENCE}; {licences[spec.photo]}",
        "extra": {
            "direction": spec.direction,
            "camera": spec.camera,
            "sprite": spec.sprite,
            "photo": spec.photo,
            "box": [left, top, left + spec.sprite_size, top + spec.sprite_size],
        },
    }


def write_manifest(
    folder: Path,
    name: str,
    splits: list[str],
    specs: list[ClipSpec],
    assets: Assets,
    clips: ClipSettings,
    licences: dict[str, str],
) -> None:
    """Writes `folder/manifest.jsonl` and `folder/images/<id>.png`; row i belongs to `splits[i]`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (split, spec) in enumerate(zip(splits, specs, strict=True)):
        identifier = f"{name}_{index:02d}"
        row = manifest_row(identifier, split, 1000 + index, spec, licences)
        Image.fromarray(render_clip(spec, assets, clips)[0]).save(folder / row["image"], optimize=True)
        lines.append(json.dumps(row, ensure_ascii=False))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(params: Path, assets: Path, calibration: Path, evaluation: Path) -> None:
    """Writes both manifests (sections `manifests` and `clips`)."""
    settings = load_section(params, "manifests", ManifestSettings)
    clips = load_section(params, "clips", ClipSettings)
    pictures = load_assets(assets)
    licences = read_photo_licences(settings.photo_table)
    rows = {
        "calibration": settings.calibration_rows,
        "validation": settings.validation_rows,
        "heldout": settings.heldout_rows,
    }
    splits = [split for split, count in rows.items() for _ in range(count)]
    specs = draw_balanced(settings.calibration_seed, len(splits), pictures, "training", clips)
    write_manifest(calibration, "calibration", splits, specs, pictures, clips, licences)
    specs = draw_balanced(settings.evaluation_seed, settings.evaluation_rows, pictures, "evaluation", clips)
    write_manifest(evaluation, "evaluation", ["evaluation"] * len(specs), specs, pictures, clips, licences)
    typer.echo(f"{len(splits)} rows in {calibration}, {len(specs)} rows in {evaluation}")


if __name__ == "__main__":
    typer.run(main)
