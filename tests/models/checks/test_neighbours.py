"""The other models of the family: what their published folders look like passes, and what contradicts them does not."""

import json

import pytest
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel

from stepquant.models.checks import check_run, check_source
from stepquant.models.source import describe_experts
from tests.models.checks.test_run import SAMPLING

NONE = [None, None]


def dense(source, **index):
    """A pipeline with one expert."""
    source.configure("model_index.json", boundary_ratio=None, transformer_2=NONE, **index)


def rewrite(source, component, **config):
    """Another config for the denoiser, and random weights that fit it."""
    values = json.loads((source / component / "config.json").read_text()) | config
    WanTransformer3DModel.from_config(values).save_pretrained(source / component)


@pytest.fixture
def text_to_video(source):
    dense(source, _class_name="WanPipeline")
    rewrite(source, "transformer", in_channels=16)
    return source


@pytest.fixture
def per_token(source):
    """Wan2.2-TI2V-5B: 48 latent channels, 16 pixels per latent, t per token."""
    dense(source, expand_timesteps=True)
    rewrite(source, "transformer", in_channels=48, out_channels=48)
    source.weights("vae").unlink()
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        z_dim=48,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    vae.save_pretrained(source / "vae")
    return source


@pytest.fixture
def with_clip(source):
    """Wan2.1-I2V: image tokens from a CLIP vision model."""
    dense(
        source,
        image_encoder=["transformers", "CLIPVisionModel"],
        image_processor=["transformers", "CLIPImageProcessor"],
    )
    rewrite(source, "transformer", image_dim=32, added_kv_proj_dim=64)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(source / "image_encoder")
    (source / "image_processor").mkdir()
    (source / "image_processor/preprocessor_config.json").write_text("{}")
    source.configure("tokenizer/tokenizer_config.json", model_max_length=512)
    return source


def test_they_pass(text_to_video):
    check_source(text_to_video.folder)


def test_t_per_token_passes_and_sizes_follow_its_vae(per_token):
    check_source(per_token.folder)
    manifest = describe_experts(per_token.folder, "ti2v", None)
    sampling = SAMPLING.model_copy(update={"height": 64, "width": 96, "steps": 4})
    check_run(per_token.folder, manifest, sampling, {"denoiser": [1000, 900, 700, 0]})
    with pytest.raises(Exception, match="sampling.width: 80; this model needs a multiple of 32: use 64 or 96"):
        check_run(per_token.folder, manifest, sampling.model_copy(update={"width": 80}))


def test_image_tokens_pass_with_their_encoder_and_512_text_tokens(with_clip):
    check_source(with_clip.folder)
    manifest = describe_experts(with_clip.folder, "i2v", None)
    with pytest.raises(Exception, match="sampling.max_sequence_length: 16; this model attends to image tokens"):
        check_run(with_clip.folder, manifest, SAMPLING)
    check_run(with_clip.folder, manifest, SAMPLING.model_copy(update={"max_sequence_length": 512}))


def test_an_image_encoder_of_another_width_or_none(with_clip):
    with_clip.configure("image_encoder/config.json", hidden_size=64)
    assert "image_dim is 32, but image_encoder/config.json has hidden_size 64" in with_clip.refusal()
    with_clip.configure("model_index.json", image_encoder=NONE)
    assert "no image_encoder, but the transformer reads image tokens" in with_clip.refusal()


def test_text_to_video_weights_in_an_image_to_video_folder(text_to_video):
    text_to_video.configure("model_index.json", _class_name="WanImageToVideoPipeline")
    assert "in_channels 16 with out_channels 16; WanImageToVideoPipeline passes latents and" in text_to_video.refusal()


def test_t_per_token_with_another_vae(per_token):
    per_token.configure("vae/config.json", z_dim=16)
    assert "with the VAE's 16 latent channels (z_dim)" in per_token.refusal()
