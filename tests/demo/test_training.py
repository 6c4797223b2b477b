"""The parts of the training that must be exactly right: codec, condition, timesteps, checkpoints."""

from pathlib import Path

import numpy as np
import torch
from demo_model.clips import draw_batch
from demo_model.denoiser import build_scheduler
from demo_model.expert_training import draw_timesteps, model_input
from demo_model.latents import condition_video, encode, grey_latents
from demo_model.linear_codec import fit_codec, install_codec, patches
from demo_model.settings import ClipSettings, DenoiserSettings, VaeSettings, load_section
from demo_model.shortcuts import silent_branches_skipped
from demo_model.sprites import Assets
from demo_model.training import Run, averaged_weights, learning_rate_at
from demo_model.vae_training import build_vae, start_vae, to_pixels
from diffusers import WanImageToVideoPipeline
from torch import nn


def small_vae(assets: Assets, clips: ClipSettings, data_folder: Path):
    settings = load_section(data_folder / "training" / "params.yaml", "vae", VaeSettings)
    return start_vae(assets, clips, settings.model_copy(update={"fit_clips": 12, "decoder_base_dim": 16}))


def test_encoder_computes_the_fitted_transform(assets: Assets, clip_settings: ClipSettings, data_folder: Path):
    _, clips = draw_batch(1, 0, 12, assets, "training", clip_settings)
    codec = fit_codec(clips)
    settings = load_section(data_folder / "training" / "params.yaml", "vae", VaeSettings)
    vae = build_vae(settings)
    install_codec(vae, codec)
    latents = encode(vae, to_pixels(clips[:2]))[:, :, 0].numpy()
    fine = patches(clips[:2, 0].astype(np.float64) / 127.5 - 1)
    coarse = patches(np.concatenate([fine, np.zeros_like(fine[..., :3])], axis=-1))
    expected = (coarse @ codec.space[:16].T - codec.mean) / codec.deviation
    # Equal but for the normalisation, which divides by almost the same number everywhere.
    assert np.corrcoef(latents.ravel(), expected.transpose(0, 3, 1, 2).ravel())[0, 1] > 0.999


def test_skipping_silent_branches_changes_nothing(assets: Assets, clip_settings: ClipSettings, data_folder: Path):
    vae = small_vae(assets, clip_settings, data_folder)
    _, clips = draw_batch(1, 0, 1, assets, "training", clip_settings)
    with torch.no_grad():
        latents = vae.encode(to_pixels(clips)).latent_dist.mode()
        image = vae.decode(latents).sample
        with silent_branches_skipped(vae):
            assert torch.equal(vae.encode(to_pixels(clips)).latent_dist.mode(), latents)
            assert torch.equal(vae.decode(latents).sample, image)


def test_training_input_is_what_the_pipeline_builds(assets: Assets, clip_settings: ClipSettings, data_folder: Path):
    vae = small_vae(assets, clip_settings, data_folder)
    _, clips = draw_batch(1, 0, 2, assets, "training", clip_settings)
    pixels = to_pixels(clips[:1])
    pipeline = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=None)
    noise = torch.randn(1, 16, 3, 16, 16)
    latents, condition = pipeline.prepare_latents(
        pixels[:, :, 0], 1, height=64, width=64, num_frames=9, dtype=torch.float32, device="cpu", latents=noise
    )
    ours = model_input(noise, encode(vae, pixels), grey_latents(vae, to_pixels(clips)))
    assert torch.allclose(ours, torch.cat([latents, condition], dim=1), atol=1e-5)
    assert torch.equal(condition_video(pixels)[:, :, 1:], torch.zeros(1, 3, 8, 64, 64))


def test_timesteps_follow_the_samplers_shift(data_folder: Path):
    random = np.random.default_rng(0)
    t = draw_timesteps(random, 1000, shift=4.0, limits=(0, 1000)).sort().values
    settings = load_section(data_folder / "training" / "params.yaml", "denoiser", DenoiserSettings)
    scheduler = build_scheduler(settings.model_copy(update={"flow_shift": 4.0}))
    scheduler.set_timesteps(1000)
    assert (t - scheduler.timesteps.float().sort().values).abs().max() < 12


def test_timesteps_stay_in_an_experts_range():
    t = draw_timesteps(np.random.default_rng(0), 64, shift=3.0, limits=(900, 1000))
    assert t.min() >= 900
    assert t.max() <= 1000


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path):
    def advance(run: Run, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(run.step))
            run.update(run.model(x).square().mean(), learning_rate_at(run.step, 10, 2, 0.1, 0.01))

    def fresh() -> Run:
        torch.manual_seed(0)
        return Run(nn.Linear(3, 2), decay=0.9)

    undisturbed, killed = fresh(), fresh()
    advance(undisturbed, 6)
    advance(killed, 3)
    killed.save(tmp_path / "run.safetensors")
    resumed = fresh()
    assert resumed.resume(tmp_path / "run.safetensors")
    advance(resumed, 3)
    assert torch.equal(resumed.model.weight, undisturbed.model.weight)
    assert torch.equal(resumed.average["weight"], undisturbed.average["weight"])
    resumed.save(tmp_path / "run.safetensors")
    assert torch.equal(averaged_weights(tmp_path / "run.safetensors")["weight"], undisturbed.average["weight"])
