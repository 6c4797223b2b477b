"""The published models, against the classes of diffusers and transformers with their published configs."""

from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from stepquant.models.families import find_family
from stepquant.plan.published import IMAGE_ENCODER, PUBLISHED, TEXT_ENCODER, VAE, describe_published
from stepquant.plan.source_model import SourceModel


def values(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


@cache
def reference(blocks: int, heads: int, ffn: int, channels: int, image_tokens: int) -> WanTransformer3DModel:
    """The class itself, without memory. image_tokens: 0, or those of one or two images."""
    image = {"image_dim": 1280, "added_kv_proj_dim": heads * 128} if image_tokens else {}
    image |= {"pos_embed_seq_len": image_tokens} if image_tokens > 257 else {}
    outputs = {36: 16}.get(channels, channels)
    sizes = {"num_layers": blocks, "num_attention_heads": heads, "ffn_dim": ffn}
    with torch.device("meta"):
        return WanTransformer3DModel(**sizes, in_channels=channels, out_channels=outputs, text_dim=4096, **image)


@pytest.fixture(params=PUBLISHED)
def published(request) -> tuple[SourceModel, WanTransformer3DModel]:
    model, config = describe_published(request.param), PUBLISHED[request.param].config
    shape = (config["num_layers"], config["num_attention_heads"], config["ffn_dim"], config["in_channels"])
    return model, reference(*shape, model.image_tokens)


def test_weights(published):
    model, expected = published
    kept = set(expected._keep_in_fp32_modules)
    for name, described in model.manifest.experts.items():
        assert described.bf16_bytes == 2 * values(expected.parameters())
        assert model.stored[described.subfolder] == 4 * values(expected.parameters())
        named = dict(expected.named_parameters())
        assert model.float32[name] == values(p for key, p in named.items() if kept & set(key.split(".")))


def test_linears(published):
    """The sites have every linear of a block, with its shape."""
    model, expected = published
    block = {
        name: (module.out_features, module.in_features)
        for name, module in expected.blocks[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for described in model.manifest.experts.values():
        sites = described.sites.values()
        assert {path: shape for site in sites for path, shape in site.linears.items()} == block
        assert described.blocks == len(expected.blocks)


def test_other_components():
    sizes = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    clip = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    patches = {"patch_size": 2, "scale_factor_spatial": 16, "in_channels": 12, "out_channels": 12, "z_dim": 48}
    with torch.device("meta"):
        assert values(UMT5EncoderModel(UMT5Config(**sizes)).parameters()) == TEXT_ENCODER
        vision = CLIPVisionModel(CLIPVisionConfig(**clip, image_size=224, patch_size=14, projection_dim=1024))
        assert values(vision.parameters()) == IMAGE_ENCODER
        assert values(AutoencoderKLWan().parameters()) == VAE[8]
        larger = AutoencoderKLWan(base_dim=160, decoder_base_dim=256, is_residual=True, **patches)
        assert values(larger.parameters()) == VAE[16]


# From model_index.json on the hub: class, lowest t of the first expert, t per token.
INDEX = {
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": ("WanImageToVideoPipeline", 900, False),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("WanPipeline", 875, False),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("WanPipeline", 0, True),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("WanPipeline", 0, False),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("WanPipeline", 0, False),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": ("WanImageToVideoPipeline", 0, False),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": ("WanImageToVideoPipeline", 0, False),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": ("WanImageToVideoPipeline", 0, False),
}


def test_what_the_index_says(published):
    model, _ = published
    pipeline, low, token_timesteps = INDEX[model.manifest.source]
    first = next(iter(model.manifest.experts.values()))
    assert (model.manifest.pipeline, first.t_range, model.token_timesteps) == (pipeline, (low, 1000), token_timesteps)


def test_the_configs_are_those_that_their_families_take(published):
    model, _ = published
    config = PUBLISHED[model.manifest.source].config
    index = {"expand_timesteps": model.token_timesteps}
    if model.image_tokens:
        index |= dict.fromkeys(("image_encoder", "image_processor"), ["transformers", "CLIP"])
    find_family(model.manifest.pipeline).check(index, [config])
