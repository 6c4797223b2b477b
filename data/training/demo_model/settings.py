"""Settings of the demo model's training, one frozen model per section of `data/training/params.yaml`.

No field has a default: the yaml file is the only place where a value is decided.
"""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: unknown keys are refused and values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


class AssetSettings(Section):
    """Where sprites and photos come from, and which of them training must never see."""

    font: Path
    font_size: int  # the one bitmap size of the colour font, in pixels
    sprite_table: Path
    sprite_pixels: int
    photo_folders: list[str]
    photo_shorter_side: int
    photos: dict[str, list[str]]  # split ("training", "evaluation") -> file names
    evaluation_sprites: list[str]


class ClipSettings(Section):
    """Geometry and speed of a clip, in pixels and pixels per frame."""

    frames: int
    size: int
    margin: int  # canvas pixels rendered beyond each edge, so that the camera can move
    sprite_speed: int
    camera_speed: int
    camera_zoom: float  # factor per frame
    sprite_sizes: tuple[int, int]  # smallest and largest longer side, in pixels
    photo_scales: tuple[float, float]  # photo pixels per clip pixel
    softness: float  # deviation of the final blur, in pixels


class ManifestSettings(Section):
    """How many rows each manifest has, and the seed of each."""

    photo_table: Path
    calibration_rows: int
    validation_rows: int
    heldout_rows: int
    evaluation_rows: int
    calibration_seed: int
    evaluation_seed: int


class TokenizerSettings(Section):
    """Size of the vocabulary and the number of captions that it is learnt from."""

    vocabulary: int
    captions: int
    text_tokens: int
    seed: int


class VaeSettings(Section):
    """The clips that the encoder is fitted to, and the shape and training of the decoder."""

    fit_clips: int
    decoder_base_dim: int
    linear_batch: int
    linear_steps: int
    linear_rate: float
    batch: int
    steps: int  # of both phases together
    schedule_steps: int  # where the learning rate reaches its final value, if the run lasts that long
    learning_rate: float
    warmup_steps: int  # of each phase
    gradient_weight: float
    first_frame_weight: float
    average_decay: float
    seed: int
    threads: int
    save_every_seconds: int


class LatentSettings(Section):
    """The pool of encoded clips that the experts train on."""

    clips: int
    batch: int
    seed: int
    threads: int


class DenoiserSettings(Section):
    """Shape of the text encoder and of both experts."""

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    text_dim: int
    text_layers: int
    text_heads: int
    text_ffn_dim: int
    text_tokens: int
    boundary_ratio: float
    flow_shift: float


class ExpertSettings(Section):
    """One run of flow-matching training."""

    batch: int
    steps: int
    schedule_steps: int  # where the learning rate reaches its final value, if the run lasts that long
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    timestep_shift: float
    timestep_range: tuple[float, float]  # t in [0, 1000]
    prompt_dropout: float
    train_text_encoder: bool
    average_decay: float
    seed: int
    threads: int
    save_every_seconds: int


class ScoreSettings(Section):
    """How the evaluation clips are sampled and measured."""

    frames: int
    text_tokens: int
    steps: int
    guidance_scale: float
    guidance_scale_2: float
    heldout_clips: int
    contact_rows: int
    seed: int
    threads: int


def load_section(path: Path, name: str, model: type[S]) -> S:
    """Reads section `name` of the yaml file at `path` into `model`.

    Raises:
        KeyError: the file has no such section.
        pydantic.ValidationError: a key is missing, unknown or of the wrong type.
    """
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    if name not in sections:
        raise KeyError(f"{path}: no section {name!r}, found {sorted(sections)}")
    return model.model_validate(sections[name])
