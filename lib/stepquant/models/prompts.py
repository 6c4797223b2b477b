"""Prompt manifests: JSONL, one prompt with its images and seed per line.

    {"id": "calibration_01", "split": "calibration", "prompt": "...", "negative_prompt": "", "image": "images/01.png",
    "seed": 7}

The model decides which images a prompt has: none for text-to-video, `image` (the first frame), or `image` and
`last_image`. Paths are relative to the manifest's folder and must not leave it. Other keys (source, license, extra)
are ignored.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stepquant.errors import InvalidInput, MissingFile, UserError
from stepquant.models.families.description import PromptImages
from stepquant.models.pictures import read_picture
from stepquant.params import Generate, Sensitivity, Trajectories

_ID = re.compile(r"[A-Za-z0-9_]+")
_TYPES = {"id": str, "split": str, "prompt": str, "negative_prompt": str, "seed": int}
_IMAGES = ("image", "last_image")

# What to put where a manifest is missing.
WANTED = (
    "put prompts of your own there, one JSON object per line with id, split, prompt, negative_prompt, seed, and the "
    "pictures that the model takes: none (text to video), image, or image and last_image "
    "(docs/quantize-your-model.md)"
)


@dataclass(frozen=True)
class Prompt:
    """One row of a manifest.

    Attributes:
        id: letters, digits and underscores; unique in the manifest.
        split: what the prompt is used for: calibration, validation, heldout or evaluation.
        prompt: text.
        negative_prompt: text, can be empty.
        images: path of each image by column, `image` and `last_image`; they exist and can be decoded.
        seed: of the initial noise, 0 to 2^63 - 1.
    """

    id: str
    split: str
    prompt: str
    negative_prompt: str
    images: Mapping[str, Path]
    seed: int

    def load_image(self, column: str = "image") -> Image.Image:
        """One image as an RGB image, upright and opaque (models/pictures.py); the first frame if no column is named."""
        return read_picture(self.images[column])

    def load_images(self) -> dict[str, Image.Image]:
        """All images as RGB images, by column."""
        return {column: self.load_image(column) for column in self.images}

    def digest(self) -> str:
        """SHA-256 (hex) of everything that determines the sample: texts, seed and the image files' bytes."""
        images = {column: hashlib.sha256(path.read_bytes()).hexdigest() for column, path in self.images.items()}
        row = [self.id, self.split, self.prompt, self.negative_prompt, self.seed, images]
        return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def read_manifest(path: Path) -> list[Prompt]:
    """Read all prompts of a manifest.

    Args:
        path: the JSONL file.

    Returns:
        The prompts in file order, at least one.

    Raises:
        UserError: the file is missing or empty, or a line is invalid; names file and line.
    """
    try:
        # Not splitlines, which also splits at separators that JSON strings can contain.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such manifest; {WANTED}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); expected a JSONL file of prompts"
        ) from None
    prompts = list(_rows(path, lines))
    if not prompts:
        raise UserError(f"{path}: the manifest is empty; expected at least one prompt")
    return prompts


def take(prompts: list[Prompt], split: str, count: int | None, where: str) -> list[Prompt]:
    """Select prompts of a split.

    Args:
        prompts: all prompts of a manifest.
        split: name of the split.
        count: number of prompts; None takes all.
        where: what an error message names.

    Returns:
        The first `count` prompts of the split.

    Raises:
        UserError: the manifest has fewer, or none.
    """
    chosen = [p for p in prompts if p.split == split]
    if not chosen or (count is not None and count > len(chosen)):
        raise UserError(f"{where}: has {len(chosen)} prompts with split '{split}'; at least {count or 1} are asked for")
    return chosen[:count]


def check_images(prompts: Sequence[Prompt], images: PromptImages, manifest: str) -> None:
    """Refuse prompts that lack an image of the model, or have one that the model would ignore.

    Args:
        prompts: some of those of a manifest.
        images: those that the model takes.
        manifest: its path, for error messages.

    Raises:
        InvalidInput: names the manifest and the prompt.
    """
    for prompt in prompts:
        for column in images.required:
            if column not in prompt.images:
                raise InvalidInput(f"{manifest}: prompt '{prompt.id}' has no '{column}', which this model needs")
        for column in prompt.images:
            if column not in images.required + images.optional:
                raise InvalidInput(
                    f"{manifest}: prompt '{prompt.id}' has '{column}', which this model would ignore; allowed: "
                    f"{', '.join(images.required + images.optional) or 'no images (text-to-video)'}"
                )


def recorded_prompts(settings: Trajectories) -> list[Prompt]:
    """The calibration, validation and held-out prompts to record. Raises UserError if there are too few."""
    rows = read_manifest(Path(settings.manifest))
    counts = {
        "calibration": settings.calibration_prompts,
        "validation": settings.validation_prompts,
        "heldout": settings.heldout_prompts,
    }
    return [prompt for split, count in counts.items() for prompt in take(rows, split, count, settings.manifest)]


def check_measured(settings: Sensitivity, recorded: int) -> None:
    """Refuse to measure the sensitivity on more prompts than are recorded.

    Args:
        settings: how many are measured.
        recorded: number of calibration prompts.

    Raises:
        InvalidInput: names the parameter.
    """
    if settings.prompts > recorded:
        raise InvalidInput(
            f"sensitivity.prompts: {settings.prompts}, but {recorded} calibration prompts are recorded; allowed: 1 to "
            f"{recorded}"
        )


def evaluation_prompts(settings: Generate) -> list[Prompt]:
    """The prompts on which every variant is sampled and scored. Raises UserError if there are too few."""
    return take(read_manifest(Path(settings.manifest)), "evaluation", settings.prompts, settings.manifest)


def _rows(path: Path, lines: list[str]) -> Iterator[Prompt]:
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _parse(line, where)
        if row["id"] in seen:
            raise UserError(f"{where}: id '{row['id']}' is used twice; ids must be unique")
        seen.add(row["id"])
        images = {name: _image(path.parent, row[name], where) for name in _IMAGES if row.get(name) is not None}
        yield Prompt(**{key: row[key] for key in _TYPES}, images=images)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_each_key_once)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {type(row).__name__}; expected one JSON object per line")
    types = _TYPES | {name: str for name in _IMAGES if row.get(name) is not None}
    for key, kind in types.items():
        if type(row.get(key)) is not kind:  # isinstance would accept true as a whole number
            raise UserError(
                f"{where}: '{key}' is {row.get(key)!r}; expected {'text' if kind is str else 'a whole number'}"
            )
    if not _ID.fullmatch(row["id"]):
        raise UserError(f"{where}: id {row['id']!r}; allowed: letters, digits and underscores")
    if not 0 <= row["seed"] < 2**63:
        raise UserError(f"{where}: seed {row['seed']}; allowed: 0 to 2^63 - 1")
    return row


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Python would keep the last of two equal keys."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise InvalidInput(f"'{twice[0]}' is there twice; keep one of the two")
    return dict(pairs)


def _image(root: Path, relative: str, where: str) -> Path:
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise UserError(f"{where}: image '{relative}' leaves the manifest's folder; allowed: paths inside {root}")
    try:
        read_picture(path)
    except MissingFile:
        raise MissingFile(f"{where}: image '{relative}' does not exist in {root}") from None
    except InvalidInput as error:
        raise InvalidInput(f"{where}: image '{relative}': {str(error).removeprefix(f'{path}: ')}") from None
    return path
