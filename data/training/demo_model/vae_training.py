"""Makes the autoencoder: the encoder is fitted in closed form (linear_encoder), the decoder is trained.

The decoder starts as a chain of plain convolutions, its residual branches silent, and is trained as that first (a sixth
of the work, and well conditioned); then everything is trained. Because the encoder never changes, latents can be
computed, and experts trained on them, while the decoder still improves.
"""

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import typer
from diffusers import AutoencoderKLWan
from torch.nn import functional as F

from demo_model.clips import draw_batch
from demo_model.linear_codec import BASE_DIM, LATENT_CHANNELS, fit_codec, install_codec, make_decoder_linear
from demo_model.settings import ClipSettings, VaeSettings, load_section
from demo_model.shortcuts import silent_branches_skipped
from demo_model.sprites import Assets, load_assets
from demo_model.training import LossLog, Run, learning_rate_at, steps_with_checkpoints


def build_vae(settings: VaeSettings) -> AutoencoderKLWan:
    """An autoencoder with random weights: 4 x 4 x 4 pixels to one position of 16 channels."""
    return AutoencoderKLWan(
        base_dim=BASE_DIM,
        decoder_base_dim=settings.decoder_base_dim,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def to_pixels(clips: np.ndarray) -> torch.Tensor:
    """(N, T, H, W, 3) uint8 to (N, 3, T, H, W) float32 in [-1, 1], the layout and range of the pipeline."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], over all elements."""
    return -10 * math.log10(F.mse_loss(image.clamp(-1, 1), reference).item() / 4)


def edges_difference(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical pixel gradients: keeps edges sharp."""
    error = image - reference
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


def reconstruction_loss(image: torch.Tensor, pixels: torch.Tensor, settings: VaeSettings) -> torch.Tensor:
    """L1 and L2 over all frames, and L1 of gradients; the first frame (which the user knows) weighs more.

    Both arguments are (N, 3, T, H, W) in [-1, 1].
    """
    frames = torch.ones(pixels.shape[2])
    frames[0] = settings.first_frame_weight
    weights = (frames / frames.mean()).view(1, 1, -1, 1, 1)
    error = image - pixels
    per_pixel = (error.abs() * weights).mean() + (error.square() * weights).mean()
    return per_pixel + settings.gradient_weight * edges_difference(image * weights, pixels * weights)


def start_vae(assets: Assets, clips: ClipSettings, settings: VaeSettings) -> AutoencoderKLWan:
    """An autoencoder with the fitted, frozen encoder and an untrained, linear decoder."""
    _, examples = draw_batch(settings.seed, 0, settings.fit_clips, assets, "training", clips)
    vae = build_vae(settings)
    install_codec(vae, fit_codec(examples))
    make_decoder_linear(vae)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def rate_at(step: int, settings: VaeSettings) -> float:
    """Learning rate; each phase warms up anew, because the second starts with branches that have never moved."""
    if step < settings.linear_steps:
        return learning_rate_at(step, settings.schedule_steps, settings.warmup_steps, settings.linear_rate, 0)
    rate, done = settings.learning_rate, step - settings.linear_steps
    return learning_rate_at(
        done, settings.schedule_steps - settings.linear_steps, settings.warmup_steps, rate, rate / 20
    )


def train_step(run: Run, step: int, assets: Assets, clips: ClipSettings, settings: VaeSettings) -> dict[str, float]:
    """One step on clips; returns the loss and the PSNR of all frames and of the first."""
    linear = step < settings.linear_steps
    # Step 0 of this seed is what the encoder was fitted to.
    count = settings.linear_batch if linear else settings.batch
    _, batch = draw_batch(settings.seed, step + 1, count, assets, "training", clips)
    pixels = to_pixels(batch)
    with torch.no_grad(), silent_branches_skipped(run.model.encoder):
        latents = run.model.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(step))
    with silent_branches_skipped(run.model.decoder) if linear else nullcontext():
        image = run.model.decode(latents).sample
    loss = reconstruction_loss(image, pixels, settings)
    run.update(loss, rate_at(step, settings))
    return {"loss": loss.item(), "psnr": psnr(image, pixels), "first": psnr(image[:, :, :1], pixels[:, :, :1])}


def main(params: Path, assets: Path, checkpoint: Path) -> None:
    """Fits the encoder and trains the decoder (section `vae`), or goes on with its checkpoint."""
    settings = load_section(params, "vae", VaeSettings)
    clips = load_section(params, "clips", ClipSettings)
    pictures = load_assets(assets)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    run = Run(start_vae(pictures, clips, settings), settings.average_decay)
    if not run.resume(checkpoint):
        run.save(checkpoint)
    typer.echo(f"at step {run.step}")
    log = LossLog(every=20)
    for step in steps_with_checkpoints(run, settings.steps, checkpoint, settings.save_every_seconds):
        log.add(step, **train_step(run, step, pictures, clips, settings))


if __name__ == "__main__":
    typer.run(main)
