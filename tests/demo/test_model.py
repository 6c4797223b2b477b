"""The committed pipeline folder loads offline and is what the rest of the repository counts on."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors import safe_open
from torch import nn


@pytest.fixture(scope="module")
def model_folder(data_folder: Path) -> Path:
    return data_folder / "models" / "wan22-mini"


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline.from_pretrained(model_folder, dtype=torch.bfloat16, local_files_only=True)


def test_two_experts_of_the_right_shape(pipeline: WanImageToVideoPipeline):
    assert pipeline.config.boundary_ratio == 0.9
    for expert in (pipeline.transformer, pipeline.transformer_2):
        assert expert.config.in_channels == 36
        assert expert.config.out_channels == 16
        assert expert.config.image_dim is None
        assert len(expert.blocks) == 6


def test_every_linear_of_a_block_is_a_multiple_of_128(pipeline: WanImageToVideoPipeline):
    for expert in (pipeline.transformer, pipeline.transformer_2):
        linears = [module for module in expert.blocks.modules() if isinstance(module, nn.Linear)]
        assert len(linears) == 6 * 10
        for linear in linears:
            assert linear.in_features % 128 == 0
            assert linear.out_features % 128 == 0


def test_experts_were_trained_apart(pipeline: WanImageToVideoPipeline):
    first, second = pipeline.transformer.state_dict(), pipeline.transformer_2.state_dict()
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[name], second[name]) for name in first if name.endswith("weight"))


def test_latent_grid_and_statistics(pipeline: WanImageToVideoPipeline):
    assert pipeline.vae_scale_factor_spatial == 4
    assert pipeline.vae_scale_factor_temporal == 4
    latents = pipeline.vae.encode(torch.zeros(1, 3, 9, 64, 64, dtype=torch.bfloat16)).latent_dist.mode()
    assert latents.shape == (1, 16, 3, 16, 16)
    assert len(set(pipeline.vae.config.latents_std)) == 16


def test_weights_are_safetensors_without_pickles(model_folder: Path):
    suffixes = {path.suffix for path in model_folder.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".md", ".png"}
    with safe_open(model_folder / "transformer" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert file.get_tensor("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16


def test_it_samples_a_clip_that_begins_with_its_image(pipeline: WanImageToVideoPipeline, data_folder: Path):
    row = json.loads((data_folder / "evaluation" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()[0])
    image = Image.open(data_folder / "evaluation" / row["image"])
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        image=image,
        prompt=row["prompt"],
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=6,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(row["seed"]),
        max_sequence_length=32,
        output_type="pt",
    ).frames[0]
    assert frames.shape == (9, 3, 64, 64)
    given = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(64, 64, 3).permute(2, 0, 1) / 255
    assert -10 * torch.log10((frames[0].float() - given).square().mean()) > 20


def test_everything_under_data_fits_the_budget(data_folder: Path):
    shipped = [data_folder / name for name in ("models", "calibration", "evaluation")]
    size = sum(path.stat().st_size for folder in shipped for path in folder.rglob("*") if path.is_file())
    assert size < 60e6
