"""Encodes a pool of training clips once, so that the experts never wait for the autoencoder.

`latents.safetensors` holds
    clip       (N, 16, T', H', W') float16, latents of whole clips, normalised
    grey       (16, T' - 1, H', W') float16, what follows the first frame's latents in the condition, normalised
    mean, deviation   (16,) float32, what they were normalised with; the autoencoder's config gets the same numbers
    importance (16,) float32, how far one unit of a channel moves the pixels, relative to the average channel
and in its metadata the key `captions`: a JSON list of N texts.
"""

import json
from pathlib import Path

import torch
import typer
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file

from demo_model.clips import draw_batch
from demo_model.linear_codec import LATENT_CHANNELS
from demo_model.settings import ClipSettings, LatentSettings, VaeSettings, load_section
from demo_model.shortcuts import silent_branches_skipped
from demo_model.sprites import load_assets
from demo_model.training import averaged_weights
from demo_model.vae_training import build_vae, to_pixels


def condition_video(pixels: torch.Tensor) -> torch.Tensor:
    """What the pipeline encodes as condition: the first frame, then zeros (grey). (N, 3, T, H, W) in [-1, 1]."""
    video = torch.zeros_like(pixels)
    video[:, :, :1] = pixels[:, :, :1]
    return video


def first_frame_mask(shape: torch.Size) -> torch.Tensor:
    """The pipeline's four mask channels for latents of `shape` (N, C, T', H', W'): one in the first latent frame.

    Returns (N, 4, T', H', W') float32.
    """
    mask = torch.zeros(shape[0], 4, *shape[2:])
    mask[:, :, 0] = 1
    return mask


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """Latents (the posterior's mode, as in the pipeline) of (N, 3, T, H, W) pixels in [-1, 1], not normalised."""
    with silent_branches_skipped(vae.encoder):
        return vae.encode(pixels).latent_dist.mode()


def grey_latents(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
    """The condition's latents behind the first frame: (16, T' - 1, H', W').

    They are the same for every image, because the fitted encoder never looks back from one group of frames to the one
    before; the first frame's own latents are those of the clip, because it is causal.

    Raises:
        ValueError: they differ between the given (N, 3, T, H, W) clips, so the encoder is not the fitted one.
    """
    behind = encode(vae, condition_video(pixels))[:, :, 1:]
    if not torch.allclose(behind, behind[:1].expand_as(behind), atol=1e-4):
        raise ValueError("the latents of grey frames depend on the first frame: conditions must be encoded one by one")
    return behind[0]


def channel_importance(vae: AutoencoderKLWan) -> torch.Tensor:
    """(16,) how far one unit of a latent channel moves the pixels, with mean 1: the inverse of the fitted encoder's
    gain, because its transforms are orthogonal."""
    gains = torch.diagonal(vae.encoder.conv_out.weight[:LATENT_CHANNELS, :LATENT_CHANNELS, 2, 1, 1].detach())
    return (1 / gains) / (1 / gains).mean()


def load_statistics(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation per channel, each (16,) float32."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("mean"), file.get_tensor("deviation")


def main(params: Path, assets: Path, vae: Path, out: Path) -> None:
    """Encodes the pool (sections `latents`, `clips`, `vae`)."""
    settings = load_section(params, "latents", LatentSettings)
    clips = load_section(params, "clips", ClipSettings)
    torch.set_num_threads(settings.threads)
    model = build_vae(load_section(params, "vae", VaeSettings))
    model.load_state_dict(averaged_weights(vae))
    pictures = load_assets(assets)
    captions: list[str] = []
    latents = []
    for step in range(settings.clips // settings.batch):
        texts, batch = draw_batch(settings.seed, step, settings.batch, pictures, "training", clips)
        captions += texts
        latents.append(encode(model, to_pixels(batch)))
    clip = torch.cat(latents)
    grey = grey_latents(model, to_pixels(batch))
    mean, deviation = clip.mean(dim=(0, 2, 3, 4)), clip.std(dim=(0, 2, 3, 4))
    shape = (-1, 1, 1, 1)
    tensors = {
        "clip": ((clip - mean.view(shape)) / deviation.view(shape)).half(),
        "grey": ((grey - mean.view(shape)) / deviation.view(shape)).half(),
        "mean": mean,
        "deviation": deviation,
        "importance": channel_importance(model),
    }
    save_file(tensors, out, metadata={"captions": json.dumps(captions)})
    typer.echo(f"{len(captions)} clips in {out}; deviation {deviation.tolist()}")


if __name__ == "__main__":
    typer.run(main)
