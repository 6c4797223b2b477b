"""Procedural clips: one sprite moves over a photo while the camera moves, and the caption says both.

Conventions, all in screen space with x to the right and y downwards:
- The sprite's direction is where it goes on the screen, whatever the camera does.
- A camera that pans left looks further left, so the background slides to the right; tilting up slides it down.
- Zooming in magnifies the background around the centre; the sprite keeps its size.
Sprite and camera move by whole pixels per frame (only zooms resample), so a clip has no flicker of its own.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from demo_model.settings import ClipSettings
from demo_model.sprites import Assets

# Unit motion on the screen (x, y): of the sprite for a direction, of the background for a camera phrase.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CAMERAS = {
    "camera pans left": (1, 0),
    "camera pans right": (-1, 0),
    "camera tilts up": (0, 1),
    "camera tilts down": (0, -1),
    "camera zooms in": (0, 0),
    "camera zooms out": (0, 0),
    "camera static": (0, 0),
}
ZOOMS = {"camera zooms in": 1, "camera zooms out": -1}


@dataclass(frozen=True)
class ClipSpec:
    """Everything that decides a clip. Positions are in pixels: the sprite's top left corner in frame 0, the
    photo window's top left corner in photo pixels; `photo_scale` is photo pixels per clip pixel."""

    sprite: str
    photo: str
    direction: str
    camera: str
    sprite_size: int
    sprite_corner: tuple[int, int]
    photo_corner: tuple[float, float]
    photo_scale: float
    mirrored: bool

    @property
    def caption(self) -> str:
        """The prompt that describes this clip."""
        article = "an" if self.sprite[0] in "aeio" else "a"
        return f"{article} {self.sprite} moving {self.direction}, {self.camera}"


def draw_spec(
    random: np.random.Generator,
    assets: Assets,
    split: str,
    settings: ClipSettings,
    direction: str | None = None,
    camera: str | None = None,
    sprite: str | None = None,
    photo: str | None = None,
) -> ClipSpec:
    """Draws a clip of a split; what is given is kept, the rest is random.

    The start is chosen so that the sprite stays inside the frame from first to last.
    """
    choices = (tuple(DIRECTIONS), tuple(CAMERAS), assets.splits["sprites"][split], assets.splits["photos"][split])
    drawn = [options[random.integers(len(options))] for options in choices]
    given = (direction, camera, sprite, photo)
    direction, camera, sprite, photo = (fixed or value for fixed, value in zip(given, drawn, strict=True))
    size = int(random.integers(settings.sprite_sizes[0], settings.sprite_sizes[1] + 1))
    travel = settings.sprite_speed * (settings.frames - 1)
    corner = tuple(
        int(random.integers(max(0, -step * travel), settings.size - size - max(0, step * travel) + 1))
        for step in DIRECTIONS[direction]
    )
    height, width = assets.photos[photo].shape[:2]
    canvas = settings.size + 2 * settings.margin
    largest = min(settings.photo_scales[1], min(height, width) / canvas)
    scale = float(random.uniform(settings.photo_scales[0], largest))
    window = tuple(float(random.uniform(0, side - canvas * scale)) for side in (width, height))
    return ClipSpec(sprite, photo, direction, camera, size, corner, window, scale, bool(random.integers(2)))


def render_background(photo: np.ndarray, spec: ClipSpec, settings: ClipSettings) -> np.ndarray:
    """The photo as the moving camera sees it: (frames, size, size, 3) uint8."""
    canvas_size = settings.size + 2 * settings.margin
    x, y = spec.photo_corner
    side = canvas_size * spec.photo_scale
    canvas = Image.fromarray(photo).resize(
        (canvas_size, canvas_size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)
    )
    if spec.mirrored:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    step_x, step_y = CAMERAS[spec.camera]
    frames = []
    for index in range(settings.frames):
        # Output pixel p shows canvas pixel (p - c) / zoom + centre - shift.
        zoom = settings.camera_zoom ** (ZOOMS.get(spec.camera, 0) * index)
        shift = settings.camera_speed * index
        middle = settings.size / 2
        offset_x = settings.margin + middle - middle / zoom - step_x * shift
        offset_y = settings.margin + middle - middle / zoom - step_y * shift
        frame = canvas.transform(
            (settings.size, settings.size),
            Image.Transform.AFFINE,
            (1 / zoom, 0, offset_x, 0, 1 / zoom, offset_y),
            Image.Resampling.BICUBIC,
        )
        frames.append(np.asarray(frame))
    return np.stack(frames)


def render_clip(spec: ClipSpec, assets: Assets, settings: ClipSettings) -> np.ndarray:
    """Renders a clip: (frames, size, size, 3) uint8 RGB."""
    frames = render_background(assets.photos[spec.photo], spec, settings).astype(np.float32)
    size = spec.sprite_size
    picture = Image.fromarray(assets.sprites[spec.sprite]).resize((size, size), Image.Resampling.LANCZOS)
    sprite = np.asarray(picture).astype(np.float32)
    alpha = sprite[..., 3:] / 255
    step_x, step_y = DIRECTIONS[spec.direction]
    for index, frame in enumerate(frames):
        left = spec.sprite_corner[0] + step_x * settings.sprite_speed * index
        top = spec.sprite_corner[1] + step_y * settings.sprite_speed * index
        under = frame[top : top + size, left : left + size]
        under[:] = alpha * sprite[..., :3] + (1 - alpha) * under
    return np.stack([soften(frame, settings.softness) for frame in np.rint(frames).clip(0, 255).astype(np.uint8)])


def soften(frame: np.ndarray, radius: float) -> np.ndarray:
    """Blurs an (H, W, 3) uint8 frame: detail as fine as one pixel is more than a small autoencoder can carry."""
    return np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(radius)))


def draw_batch(
    seed: int, step: int, count: int, assets: Assets, split: str, settings: ClipSettings
) -> tuple[list[str], np.ndarray]:
    """The clips of one training step: captions and (count, frames, size, size, 3) uint8.

    Depends on (seed, step) alone, so a resumed training sees what an undisturbed one would have seen.
    """
    random = np.random.default_rng([seed, step])
    specs = [draw_spec(random, assets, split, settings) for _ in range(count)]
    return [spec.caption for spec in specs], np.stack([render_clip(spec, assets, settings) for spec in specs])
