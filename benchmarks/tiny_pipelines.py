"""Tiny random pipelines of every published model that stepquant knows, of diffusers' own classes.

Text encoder, tokenizer, VAE and scheduler are those of the demo model.
"""

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

DEMO = Path(__file__).resolve().parent.parent / "data/models/wan22-mini"
CLIP_TOKENS = 5  # of a picture: 2 x 2 patches and the class token
WIDTH = 64


@dataclass(frozen=True)
class TinyPipeline:
    """What distinguishes a published model.

    Attributes:
        pipeline: pipeline class.
        in_channels: of the denoiser; 16 are latents.
        boundary_ratio: between two experts; None for one.
        expand_timesteps: whether there is a t per token.
        image_tokens: pictures whose CLIP tokens the denoiser attends to.
        images: columns of a prompt.
    """

    pipeline: str
    in_channels: int = 16
    boundary_ratio: float | None = None
    expand_timesteps: bool = False
    image_tokens: int = 0
    images: tuple[str, ...] = field(default=())


I2V, T2V = "WanImageToVideoPipeline", "WanPipeline"
TINY_PIPELINES = {
    "Wan2.2-I2V-A14B": TinyPipeline(I2V, 36, 0.9, images=("image",)),
    "Wan2.1-I2V": TinyPipeline(I2V, 36, image_tokens=1, images=("image",)),
    "Wan2.1-FLF2V": TinyPipeline(I2V, 36, image_tokens=2, images=("image", "last_image")),
    "Wan2.2-TI2V-5B image": TinyPipeline(I2V, expand_timesteps=True, images=("image",)),
    "Wan2.2-T2V-A14B": TinyPipeline(T2V, boundary_ratio=0.875),
    "Wan2.1-T2V": TinyPipeline(T2V),
    "Wan2.2-TI2V-5B": TinyPipeline(T2V, expand_timesteps=True),
}


def save_pipeline(folder: Path, described: TinyPipeline, blocks: int = 2) -> Path:
    """Write a pipeline folder.

    Args:
        folder: is created.
        described: the model.
        blocks: of each expert.
    """
    folder.mkdir(parents=True)
    index = json.loads((DEMO / "model_index.json").read_text())
    index |= {"_class_name": described.pipeline, "boundary_ratio": described.boundary_ratio}
    index |= {"expand_timesteps": described.expand_timesteps}
    for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
        shutil.copytree(DEMO / part, folder / part)
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"model_max_length": 512}))
    subfolders = ["transformer"] + ["transformer_2"] * (described.boundary_ratio is not None)
    for seed, subfolder in enumerate(subfolders):
        random_denoiser(described, blocks, seed).save_pretrained(folder / subfolder)
    if len(subfolders) == 1:
        index["transformer_2"] = [None, None]
    if described.image_tokens:
        _save_image_encoder(folder)
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    if described.pipeline == T2V:
        del index["image_encoder"], index["image_processor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def random_denoiser(described: TinyPipeline, blocks: int, seed: int, heads: int = 1) -> WanTransformer3DModel:
    """A denoiser in which every parameter is random, so that nothing that it is given goes without effect."""
    pictures = described.image_tokens
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=WIDTH,
        in_channels=described.in_channels,
        out_channels=16,
        text_dim=128,
        freq_dim=32,
        ffn_dim=2 * heads * WIDTH,
        num_layers=blocks,
        rope_max_seq_len=64,
        image_dim=32 if pictures else None,
        added_kv_proj_dim=heads * WIDTH if pictures else None,
        pos_embed_seq_len=pictures * CLIP_TOKENS if pictures > 1 else None,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("weight") and parameter.ndim == 1:  # of a norm
            parameter.data = 1 + 0.1 * noise
        elif name.endswith("weight"):
            parameter.data = noise / math.sqrt(parameter[0].numel())
        else:
            parameter.data = 0.2 * noise
    return model.eval()


def _save_image_encoder(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=32))
    encoder.save_pretrained(folder / "image_encoder")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "image_processor")


def load(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline by diffusers' own way."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"])
    pipe: DiffusionPipeline = pipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return pipe
