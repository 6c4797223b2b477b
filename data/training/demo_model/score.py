"""Measures the assembled pipeline on the evaluation manifest, and draws a contact sheet.

What is measured on generated clips is measured on the true clips as well: the second number says how far the
measurement itself can be trusted.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from diffusers import WanImageToVideoPipeline
from PIL import Image

from demo_model.clips import ClipSpec, draw_batch, render_clip
from demo_model.manifests import draw_balanced
from demo_model.motion import camera_of, direction_of, track
from demo_model.settings import ClipSettings, ManifestSettings, ScoreSettings, load_section
from demo_model.sprites import Assets, load_assets
from demo_model.vae_training import psnr, to_pixels
from stepquant.models.sampling import sample
from stepquant.params import Sampling


@dataclass(frozen=True)
class Measured:
    """One clip: does the sprite go where the prompt says, does the camera, and frame 0 against the image in dB."""

    direction: bool
    camera: bool
    first_frame: float


def decibels(image: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of two uint8 pictures."""
    error = np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def generate(pipeline: WanImageToVideoPipeline, row: dict, image: Image.Image, settings: ScoreSettings) -> np.ndarray:
    """Samples the clip of one manifest row: (T, H, W, 3) uint8."""
    sampling = Sampling(
        height=image.height,
        width=image.width,
        num_frames=settings.frames,
        steps=settings.steps,
        flow_shift=pipeline.scheduler.config.flow_shift,
        guidance_scale=settings.guidance_scale,
        guidance_scale_2=settings.guidance_scale_2,
        max_sequence_length=settings.text_tokens,
    )
    video = sample(pipeline, sampling, row["prompt"], row["negative_prompt"], {"image": image}, row["seed"], "np")
    return np.rint(video * 255).clip(0, 255).astype(np.uint8)


def measure(clip: np.ndarray, row: dict, image: np.ndarray, clips: ClipSettings) -> Measured:
    """Measures one (T, H, W, 3) uint8 clip against its row."""
    displacement, flows, backgrounds = track(clip, row["extra"]["box"])
    travel = clips.sprite_speed * (clips.frames - 1)
    return Measured(
        direction=direction_of(displacement, travel) == row["extra"]["direction"],
        camera=camera_of(flows, backgrounds) == row["extra"]["camera"],
        first_frame=decibels(clip[0], image),
    )


def shares(measured: list[Measured]) -> dict[str, float]:
    """How many of the clips move as their prompts say."""
    return {
        "direction_share": float(np.mean([one.direction for one in measured])),
        "camera_share": float(np.mean([one.camera for one in measured])),
    }


def first_frames(measured: list[Measured]) -> dict[str, float]:
    """Mean, middle and lowest PSNR of frame 0 over clips."""
    first = [one.first_frame for one in measured]
    return {
        "first_frame_psnr_mean": float(np.mean(first)),
        "first_frame_psnr_median": float(np.median(first)),
        "first_frame_psnr_lowest": float(np.min(first)),
    }


@torch.no_grad()
def reconstruction(
    pipeline: WanImageToVideoPipeline, assets: Assets, clips: ClipSettings, settings: ScoreSettings
) -> dict[str, float]:
    """PSNR of the autoencoder on held-out clips: mean over clips, of all frames and of the first."""
    _, batch = draw_batch(settings.seed, 0, settings.heldout_clips, assets, "evaluation", clips)
    everything, first = [], []
    for pixels in to_pixels(batch).split(1):
        image = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
        everything.append(psnr(image, pixels))
        first.append(psnr(image[:, :, :1], pixels[:, :, :1]))
    return {"vae_psnr": float(np.mean(everything)), "vae_first_frame_psnr": float(np.mean(first))}


def contact_sheet(images: list[np.ndarray], clips: list[np.ndarray], scale: int) -> Image.Image:
    """One row per clip: the input image, a gap, then every second frame."""
    gap = np.full((images[0].shape[0], 4, 3), 255, dtype=np.uint8)
    rows = [np.concatenate([image, gap, *clip[::2]], axis=1) for image, clip in zip(images, clips, strict=True)]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def true_specs(assets: Assets, manifests: ManifestSettings, clips: ClipSettings) -> list[ClipSpec]:
    """The clips that the evaluation rows were taken from."""
    return draw_balanced(manifests.evaluation_seed, manifests.evaluation_rows, assets, "evaluation", clips)


def main(params: Path, assets: Path, evaluation: Path, model: Path, out: Path, sheet: Path) -> None:
    """Scores the pipeline in `model` (section `score`); writes numbers to `out` and pictures to `sheet`."""
    settings = load_section(params, "score", ScoreSettings)
    clips = load_section(params, "clips", ClipSettings)
    torch.set_num_threads(settings.threads)
    pictures = load_assets(assets)
    specs = true_specs(pictures, load_section(params, "manifests", ManifestSettings), clips)
    rows = [json.loads(line) for line in (evaluation / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    pipeline = WanImageToVideoPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    images = [np.asarray(Image.open(evaluation / row["image"])) for row in rows]
    started = time.monotonic()
    generated = [
        generate(pipeline, row, Image.fromarray(image), settings) for row, image in zip(rows, images, strict=True)
    ]
    seconds = (time.monotonic() - started) / len(rows)
    true = [render_clip(spec, pictures, clips) for spec in specs]
    pairs = list(zip(rows, images, strict=True))
    measured, truth = (
        [measure(clip, *pair, clips) for clip, pair in zip(videos, pairs, strict=True)] for videos in (generated, true)
    )
    scores = {
        "generated": shares(measured) | first_frames(measured),
        "true_clips": shares(truth),
        "autoencoder": reconstruction(pipeline, pictures, clips, settings),
        "seconds_per_clip": seconds,
    }
    out.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    contact_sheet(images[: settings.contact_rows], generated[: settings.contact_rows], 2).save(sheet, optimize=True)
    typer.echo(json.dumps(scores, indent=2))


if __name__ == "__main__":
    typer.run(main)
