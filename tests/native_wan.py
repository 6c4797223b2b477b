"""Tiny denoisers of the Wan families, and Wan-Video's own names of their tensors.

The names are those of github.com/Wan-Video/Wan2.2, wan/modules/model.py, written down apart from stepquant's table and
in the other direction.
"""

import re

import torch
from diffusers import WanTransformer3DModel

# What the families differ in, at two blocks and 32 channels: conditions in the input, image tokens, their positions.
FAMILIES = {
    "i2v-2.2": {"in_channels": 36},
    "t2v": {"in_channels": 16},
    "i2v-2.1": {"in_channels": 36, "image_dim": 24, "added_kv_proj_dim": 32},
    "flf2v-2.1": {"in_channels": 36, "image_dim": 24, "added_kv_proj_dim": 32, "pos_embed_seq_len": 6},
}
REPLACED = (
    (r"\battn1\.", "self_attn."),
    (r"\battn2\.", "cross_attn."),
    (r"\bto_([qkv])\b", r"\1"),
    (r"\bto_out\.0\b", "o"),
    (r"\badd_([kv])_proj\b", r"\1_img"),
    (r"\bnorm_added_k\b", "norm_k_img"),
    (r"\bffn\.net\.0\.proj\b", "ffn.0"),
    (r"\bffn\.net\.2\b", "ffn.2"),
    (r"(blocks\.\d+)\.norm2\b", r"\1.norm3"),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\b", "head.head"),
    (r"^condition_embedder\.time_proj\b", "time_projection.1"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\b", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\b", r"\1_embedding.2"),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^condition_embedder\.image_embedder\.norm1\b", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\b", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\b", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2\b", "img_emb.proj.4"),
)


def native_name(key: str) -> str:
    """Wan-Video's name of a tensor or module of diffusers' WanTransformer3DModel."""
    for pattern, replacement in REPLACED:
        key = re.sub(pattern, replacement, key)
    return key


def tiny_denoiser(family: str, seed: int = 0) -> WanTransformer3DModel:
    """A denoiser of a family with random float32 parameters, also norms and biases."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=16,
        text_dim=20,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
        **FAMILIES[family],
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()
