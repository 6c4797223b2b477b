"""A small random denoiser with all parts of the real one: two blocks, qk norm, cross-attention norm, modulation."""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from stepquant.models.families import find_denoiser

BLOCKS = 2
SITES = find_denoiser("WanTransformer3DModel").sites({})
CHANNELS, TEXT_LENGTH, TEXT_DIM = 36, 5, 32


def save_expert(folder: Path, dtype: torch.dtype, seed: int = 0) -> Path:
    """Save the denoiser as diffusers does, with weights in dtype. All parameters are random, also norms and biases."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=128,
        num_layers=BLOCKS,
        rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise
    model.to(dtype).save_pretrained(folder)
    return folder


def load_expert(folder: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    """diffusers' own way to the same denoiser."""
    return WanTransformer3DModel.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def random_calls(count: int, dtype: torch.dtype, seed: int = 1) -> dict[str, torch.Tensor]:
    """What the pipeline would hand to the denoiser in `count` calls: 2 x 4 x 6 latents, so 12 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(count, CHANNELS, 2, 4, 6, generator=generator).to(dtype),
        "timestep": torch.linspace(1000, 1, count),
        "encoder_hidden_states": torch.randn(count, TEXT_LENGTH, TEXT_DIM, generator=generator).to(dtype),
    }
