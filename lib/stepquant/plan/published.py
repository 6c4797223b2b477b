"""The published models by their hub id, so that a plan needs no download.

Shapes are those of the config.json files on the hub. Every expert is published in float32. All have the text encoder
UMT5-XXL, in bfloat16 since Wan2.2. Tests compare the numbers with the classes of diffusers and transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepquant.models.families import find_family
from stepquant.models.families.description import Config
from stepquant.models.manifest import Compression, DenoiserInputs, ExpertManifest, ModelManifest, SiteManifest
from stepquant.plan.source_model import SourceModel, image_tokens

# The scheduler_config.json of every published pipeline, but for what only saving and loading needs.
SCHEDULER: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
}
TEXT_ENCODER = 5_680_910_336  # weights of UMT5-XXL's encoder
IMAGE_ENCODER = 630_766_080  # of CLIP ViT-H/14
VAE = {8: 126_892_531, 16: 704_688_668}  # of the Wan2.1 and the Wan2.2 VAE, by their pixels per latent
FREQ_DIM = 256  # channels of the sinusoids of t


@dataclass(frozen=True)
class Published:
    """A published pipeline.

    Attributes:
        pipeline: Class name.
        config: Keys of the transformer's config.json that decide shapes.
        boundary: boundary_ratio of model_index.json; None for a dense model.
        spatial: Pixels per latent of its VAE.
        token_timesteps: expand_timesteps of model_index.json.
        text_itemsize: Bytes of a value of its text encoder on disk.
    """

    pipeline: str
    config: Mapping[str, Any]
    boundary: float | None = None
    spatial: int = 8
    token_timesteps: bool = False
    text_itemsize: int = 2


def _wan(blocks: int, heads: int, ffn: int, channels: int, latents: int = 16, **others: Any) -> dict[str, Any]:
    sizes = {"num_layers": blocks, "num_attention_heads": heads, "attention_head_dim": 128, "ffn_dim": ffn}
    inputs = {"in_channels": channels, "out_channels": latents, "patch_size": [1, 2, 2], "text_dim": 4096}
    return sizes | inputs | others


_IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120}
_T2V, _I2V = "WanPipeline", "WanImageToVideoPipeline"
_WAN21_IMAGE = Published(_I2V, _wan(40, 40, 13824, 36, **_IMAGE), text_itemsize=4)
PUBLISHED = {
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": Published(_I2V, _wan(40, 40, 13824, 36), boundary=0.9),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": Published(_T2V, _wan(40, 40, 13824, 16), boundary=0.875),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": Published(
        _T2V, _wan(30, 24, 14336, 48, latents=48), spatial=16, token_timesteps=True
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Published(_T2V, _wan(30, 12, 8960, 16), text_itemsize=4),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Published(_T2V, _wan(40, 40, 13824, 16), text_itemsize=4),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _WAN21_IMAGE,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _WAN21_IMAGE,
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": Published(
        _I2V, _wan(40, 40, 13824, 36, pos_embed_seq_len=514, **_IMAGE), text_itemsize=4
    ),
}


def describe_published(source: str) -> SourceModel:
    """A published model, by a key of PUBLISHED."""
    model = PUBLISHED[source]
    denoiser = ["diffusers", "WanTransformer3DModel"]
    index = {"transformer": denoiser, "boundary_ratio": model.boundary}
    index |= {"transformer_2": denoiser} if model.boundary else {}
    steps, family = SCHEDULER["num_train_timesteps"], find_family(model.pipeline)
    expert = _expert(model.config, model.pipeline)
    experts = {
        found.name: expert.model_copy(
            update={"subfolder": found.subfolder, "t_range": (found.low * steps, found.high * steps)}
        )
        for found in family.experts(index)
    }
    values = {"text_encoder": TEXT_ENCODER, "vae": VAE[model.spatial]}
    stored = {described.subfolder: 2 * described.bf16_bytes for described in experts.values()}
    stored |= {"text_encoder": model.text_itemsize * TEXT_ENCODER, "vae": 4 * VAE[model.spatial]}
    if image_tokens(dict(model.config)):
        values["image_encoder"], stored["image_encoder"] = IMAGE_ENCODER, 4 * IMAGE_ENCODER
    return SourceModel(
        manifest=ModelManifest(
            source=source,
            revision=None,
            pipeline=model.pipeline,
            num_train_timesteps=steps,
            compression=Compression(scale_factor_spatial=model.spatial, scale_factor_temporal=4),
            images=family.images(index | {"expand_timesteps": model.token_timesteps}, model.config),
            experts=experts,
        ),
        stored=stored,
        values=values,
        float32=dict.fromkeys(experts, _float32_values(model.config)),
        scheduler=SCHEDULER,
        image_tokens=image_tokens(dict(model.config)),
        image_dim=model.config.get("image_dim", 0),
        token_timesteps=model.token_timesteps,
        download=True,
    )


def _expert(config: Config, pipeline: str) -> ExpertManifest:
    """An expert as the model manifest describes it; its place in the pipeline is set afterwards."""
    width, ffn = _width(config), config["ffn_dim"]
    shapes = {"ffn.net.0.proj": (ffn, width), "ffn.net.2": (width, ffn)}
    sites = {
        site.name: SiteManifest(
            depends_on_timestep=site.depends_on_timestep,
            linears={path: shapes.get(path, (width, width)) for path in site.linears},
        )
        for site in find_family(pipeline).denoiser.sites(config)
    }
    inputs = DenoiserInputs.model_validate({key: config[key] for key in DenoiserInputs.model_fields})
    weights = sum(site.rows * site.columns for site in sites.values())
    values = config["num_layers"] * (weights + _block_values(config)) + _outer_values(config)
    return ExpertManifest(
        subfolder="", t_range=(0, 0), blocks=config["num_layers"], sites=sites, inputs=inputs, bf16_bytes=2 * values
    )


def _block_values(config: Config) -> int:
    """Weights of a block that are not quantized: biases, norms of q and k, the affine norm, the table of modulation."""
    width, ffn = _width(config), int(config["ffn_dim"])
    image = 3 * width if config.get("added_kv_proj_dim") else 0  # two biases and a norm
    return 9 * width + ffn + 4 * width + 2 * width + 6 * width + image


def _outer_values(config: Config) -> int:
    """Weights outside the blocks."""
    width, patch = _width(config), 4  # of 1 x 2 x 2 latents
    values: int = config["in_channels"] * patch * width + width + width * config["out_channels"] * patch
    values += config["out_channels"] * patch + 2 * width  # proj_out's bias, the table of the last modulation
    values += _linear(FREQ_DIM, width) + _linear(width, width) + _linear(width, 6 * width)  # of t
    values += _linear(config["text_dim"], width) + _linear(width, width)
    if config.get("image_dim"):
        dim = config["image_dim"]
        values += 2 * dim + _linear(dim, dim) + _linear(dim, width) + 2 * width
        values += config.get("pos_embed_seq_len", 0) * dim
    return values


def _float32_values(config: Config) -> int:
    """Weights that diffusers keeps in float32: the embedding of t, the tables of modulation, the norms by that name."""
    width = _width(config)
    values: int = _linear(FREQ_DIM, width) + _linear(width, width) + 2 * width + config["num_layers"] * 8 * width
    return values + (2 * (config["image_dim"] + width) if config.get("image_dim") else 0)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _width(config: Config) -> int:
    width: int = config["num_attention_heads"] * config["attention_head_dim"]
    return width
