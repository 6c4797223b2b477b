"""Sprites from a colour-emoji font and backgrounds from photos, collected into one assets file.

`assets.safetensors` holds, all uint8:
    sprite/<name>   (P, P, 4) straight-alpha RGBA, centred, longer side = P
    photo/<stem>    (H, W, 3) RGB, shorter side = `photo_shorter_side`
and in its metadata the key `splits`: JSON {"sprites": {split: [name]}, "photos": {split: [stem]}}.
"""

import csv
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.numpy import save_file

from demo_model.settings import AssetSettings, load_section

SPLITS = ("training", "evaluation")


@dataclass(frozen=True)
class Assets:
    """Pictures by name, and which names belong to which split."""

    sprites: dict[str, np.ndarray]
    photos: dict[str, np.ndarray]
    splits: dict[str, dict[str, list[str]]]


def read_sprite_table(path: Path) -> dict[str, str]:
    """Maps a sprite's name (the noun of its caption) to its character."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {row["name"]: chr(int(row["codepoint"], 16)) for row in rows}


def draw_sprite(font: ImageFont.FreeTypeFont, character: str, pixels: int) -> np.ndarray:
    """Renders one colour glyph as (pixels, pixels, 4) uint8 RGBA, cropped to its ink and centred.

    Raises:
        ValueError: the font has no picture for the character.
    """
    sheet = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(sheet).text((64, 64), character, font=font, embedded_color=True)
    box = sheet.getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for U+{ord(character):04X}")
    return square(sheet.crop(box), pixels)


def square(picture: Image.Image, pixels: int) -> np.ndarray:
    """Fits an RGBA picture into a transparent square: (pixels, pixels, 4) uint8."""
    scale = pixels / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = Image.new("RGBA", (pixels, pixels))
    fitted.paste(picture.resize(size, Image.Resampling.LANCZOS), ((pixels - size[0]) // 2, (pixels - size[1]) // 2))
    return np.asarray(fitted)


def resolve_folder(folder: str) -> Path:
    """A photo folder: a path, or `package:NAME/SUBFOLDER` for pictures that an installed package carries."""
    if not folder.startswith("package:"):
        return Path(folder)
    package, _, inside = folder.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"photo folder {folder!r}: package {package!r} is not installed")
    return Path(spec.submodule_search_locations[0]) / inside


def read_photo(folders: list[Path], name: str, shorter_side: int) -> np.ndarray:
    """Reads a photo from the first folder that has it: (H, W, 3) uint8 with the given shorter side."""
    for folder in folders:
        if (folder / name).is_file():
            with Image.open(folder / name) as file:
                photo = file.convert("RGB")
            scale = shorter_side / min(photo.size)
            size = (round(photo.width * scale), round(photo.height * scale))
            return np.asarray(photo.resize(size, Image.Resampling.LANCZOS))
    raise FileNotFoundError(f"photo {name!r} is in none of {[str(folder) for folder in folders]}")


def collect_assets(settings: AssetSettings) -> Assets:
    """Draws all sprites and reads all photos that the settings name."""
    table = read_sprite_table(settings.sprite_table)
    unknown = sorted(set(settings.evaluation_sprites) - set(table))
    if unknown:
        raise ValueError(f"evaluation_sprites: {unknown} are not in {settings.sprite_table}")
    font = ImageFont.truetype(str(settings.font), settings.font_size)
    folders = [resolve_folder(folder) for folder in settings.photo_folders]
    photos = {
        Path(name).stem: read_photo(folders, name, settings.photo_shorter_side)
        for split in SPLITS
        for name in settings.photos[split]
    }
    heldout = settings.evaluation_sprites
    return Assets(
        sprites={name: draw_sprite(font, character, settings.sprite_pixels) for name, character in table.items()},
        photos=photos,
        splits={
            "sprites": {"training": [name for name in table if name not in heldout], "evaluation": list(heldout)},
            "photos": {split: [Path(name).stem for name in settings.photos[split]] for split in SPLITS},
        },
    )


def save_assets(assets: Assets, path: Path) -> None:
    """Writes the assets file described at the top of this module."""
    tensors = {f"sprite/{name}": np.ascontiguousarray(value) for name, value in assets.sprites.items()}
    tensors |= {f"photo/{name}": np.ascontiguousarray(value) for name, value in assets.photos.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"splits": json.dumps(assets.splits, sort_keys=True)})


def load_assets(path: Path) -> Assets:
    """Reads an assets file back."""
    with safe_open(path, framework="numpy") as file:
        splits = json.loads(file.metadata()["splits"])
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    return Assets(
        sprites={key.removeprefix("sprite/"): value for key, value in tensors.items() if key.startswith("sprite/")},
        photos={key.removeprefix("photo/"): value for key, value in tensors.items() if key.startswith("photo/")},
        splits=splits,
    )


def main(params: Path, out: Path) -> None:
    """Collects sprites and photos into one assets file (section `assets`)."""
    assets = collect_assets(load_section(params, "assets", AssetSettings))
    save_assets(assets, out)
    typer.echo(f"{len(assets.sprites)} sprites and {len(assets.photos)} photos in {out}")


if __name__ == "__main__":
    typer.run(main)
