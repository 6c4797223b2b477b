"""What the families say, against diffusers' own classes and the published configs."""

import inspect

import pytest
import torch

from stepquant.errors import InvalidInput
from stepquant.models.families import find_denoiser, find_family
from stepquant.models.families.description import ExpertRange, PromptImages
from stepquant.params import Sampling

MODEL = ["diffusers", "WanTransformer3DModel"]
DENSE = {"transformer": MODEL, "transformer_2": [None, None], "boundary_ratio": None}
DUAL = {"transformer": MODEL, "transformer_2": MODEL, "boundary_ratio": 0.875}
CLIP = {"image_encoder": ["transformers", "CLIPVisionModel"], "image_processor": ["transformers", "CLIPImageProcessor"]}
EXPAND = {"expand_timesteps": True}

# The facts of the published configs that decide how a pipeline calls its denoiser.
T2V = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2]}
TI2V = {"in_channels": 48, "out_channels": 48, "patch_size": [1, 2, 2]}
I2V = T2V | {"in_channels": 36}
IMAGE_TOKENS = I2V | {"image_dim": 1280, "added_kv_proj_dim": 5120}
FLF2V = IMAGE_TOKENS | {"pos_embed_seq_len": 514}

IMAGE_TO_VIDEO, TEXT_TO_VIDEO = "WanImageToVideoPipeline", "WanPipeline"
PUBLISHED = {
    "Wan2.2-I2V-A14B": (IMAGE_TO_VIDEO, DUAL, I2V, PromptImages(("image",), ("last_image",))),
    "Wan2.1-I2V-14B": (IMAGE_TO_VIDEO, DENSE | CLIP, IMAGE_TOKENS, PromptImages(("image",))),
    "Wan2.1-FLF2V-14B": (IMAGE_TO_VIDEO, DENSE | CLIP, FLF2V, PromptImages(("image", "last_image"))),
    "Wan2.2-TI2V-5B, image": (IMAGE_TO_VIDEO, DENSE | EXPAND, TI2V, PromptImages(("image",))),
    "Wan2.2-T2V-A14B": (TEXT_TO_VIDEO, DUAL, T2V, PromptImages()),
    "Wan2.1-T2V": (TEXT_TO_VIDEO, {"transformer": MODEL}, T2V, PromptImages()),
    "Wan2.2-TI2V-5B": (TEXT_TO_VIDEO, DENSE | EXPAND, TI2V, PromptImages()),
}


def sampling(**changes):
    values = {"height": 480, "width": 832, "num_frames": 81, "steps": 40, "flow_shift": 5.0}
    values |= {"guidance_scale": 3.5, "guidance_scale_2": 3.0, "max_sequence_length": 512}
    return Sampling.model_validate(values | changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    pipeline, index, config, images = PUBLISHED[name]
    family = find_family(pipeline)
    experts = family.experts(index)
    assert family.images(index, config) == images
    family.check(index, [config] * len(experts))
    family.check_sampling(sampling(), config)
    # Every argument has a parameter in the call of the real class.
    parameters = inspect.signature(family.load().__call__).parameters
    for argument in (*family.call(sampling(), index), *images.required, *images.optional):
        assert argument in parameters
    assert ("guidance_scale_2" in family.call(sampling(), index)) == (len(experts) == 2)


def test_experts_and_their_ranges():
    family = find_family(TEXT_TO_VIDEO)
    assert family.experts(DUAL) == (
        ExpertRange("high_noise", "transformer", 0.875, 1.0),
        ExpertRange("low_noise", "transformer_2", 0.0, 0.875),
    )
    assert family.experts(DENSE) == (ExpertRange("denoiser", "transformer", 0.0, 1.0),)


@pytest.mark.parametrize("added", [None, 64])
def test_the_sites_are_every_linear_of_a_block_in_the_order_in_which_they_are_reached(added):
    denoiser = find_denoiser("WanTransformer3DModel")
    config = {"added_kv_proj_dim": added, "image_dim": added and 32, "num_layers": 1, "ffn_dim": 128, "freq_dim": 32}
    config |= {"num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 32, "rope_max_seq_len": 32}
    model = denoiser.load()(**config).eval()
    (block,) = getattr(model, denoiser.stack.attribute)
    reached = []
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: reached.append((name, args[0].shape[1])))
    image = {} if added is None else {"encoder_hidden_states_image": torch.randn(1, 5, 32)}
    model(torch.randn(1, 16, 1, 4, 6), torch.tensor([500.0]), torch.randn(1, 512, 32), **image)
    sites = denoiser.sites(config)
    assert sorted(name for name, _ in reached) == sorted(path for site in sites for path in site.linears)
    first = [site.linears[0] for site in sites]
    assert [name for name, _ in reached if name in first] == first
    tokens = dict(reached)
    assert tokens["attn1.to_q"] == 6 and tokens["attn2.to_k"] == 512
    assert tokens.get("attn2.add_k_proj") == (None if added is None else 5)
    assert [site.name for site in sites if not site.depends_on_timestep] == ["attn2.kv"] + ["attn2.add_kv"] * bool(
        added
    )


def test_the_arguments_that_a_denoiser_names_exist():
    denoiser = find_denoiser("WanTransformer3DModel")
    parameters = list(inspect.signature(denoiser.load().forward).parameters)
    assert denoiser.latents in parameters and denoiser.timestep in parameters
    block = inspect.signature(type(denoiser.load()(num_layers=1, **SMALL).blocks[0]).forward).parameters
    assert denoiser.stack.carried in block


SMALL = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8, "freq_dim": 8, "text_dim": 8}


@pytest.mark.parametrize(
    "name",
    [
        "WanVACEPipeline",
        "WanAnimatePipeline",
        "WanVideoToVideoPipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "LTXPipeline",
        "CogVideoXImageToVideoPipeline",
        "wanpipeline",
        ["pipeline", "WanPipeline"],
        None,
    ],
)
def test_another_pipeline_class_is_refused_by_name(name):
    with pytest.raises(InvalidInput) as caught:
        find_family(name)
    assert str(caught.value) == (
        f"model_index.json: _class_name {name!r} is not supported; allowed: WanImageToVideoPipeline, WanPipeline"
    )


@pytest.mark.parametrize("name", ["WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel", None])
def test_another_denoiser_class_is_refused_by_name(name):
    with pytest.raises(InvalidInput, match=f"config.json: _class_name {name!r} is not supported"):
        find_denoiser(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundary_ratio": None}, "a transformer_2 but no boundary_ratio"),
        ({"transformer_2": [None, None]}, "boundary_ratio 0.875 but no transformer_2"),
        ({"transformer": [None, None]}, "no transformer; expected"),
        ({"boundary_ratio": 1.0}, "boundary_ratio 1.0; allowed: a number between 0 and 1"),
        ({"boundary_ratio": "0.9"}, "boundary_ratio '0.9'; allowed: a number between 0 and 1"),
        ({"transformer": ["diffusers", "WanVACETransformer3DModel"]}, "transformer is a WanVACETransformer3DModel"),
        ({"transformer_2": ["own", "WanTransformer3DModel"]}, "transformer_2 is a WanTransformer3DModel; allowed"),
    ],
)
def test_experts_that_the_pipeline_would_not_call_as_the_index_says(changes, message):
    with pytest.raises(InvalidInput) as caught:
        find_family(TEXT_TO_VIDEO).experts(DUAL | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("pipeline", "index", "configs", "message"),
    [
        (TEXT_TO_VIDEO, DENSE, [IMAGE_TOKENS], "WanPipeline passes no image tokens"),
        (TEXT_TO_VIDEO, DENSE, [I2V], "in_channels 36 with out_channels 16; WanPipeline passes 16 channels"),
        (IMAGE_TO_VIDEO, DENSE, [T2V], "in_channels 16 with out_channels 16; WanImageToVideoPipeline passes latents"),
        (IMAGE_TO_VIDEO, DENSE | EXPAND, [I2V], "passes 16 channels of latents alone"),
        (IMAGE_TO_VIDEO, DENSE, [IMAGE_TOKENS], "no image_encoder"),
        (IMAGE_TO_VIDEO, DENSE, [I2V | {"image_dim": 1280}], "image_dim 1280 with added_kv_proj_dim None"),
        (IMAGE_TO_VIDEO, DENSE, [I2V | {"pos_embed_seq_len": 514}], "pos_embed_seq_len 514 without image_dim"),
        (IMAGE_TO_VIDEO, DUAL | CLIP, [IMAGE_TOKENS, I2V], "transformer_2 config"),
        (TEXT_TO_VIDEO, DENSE | EXPAND, [TI2V | {"patch_size": [1, 1, 1]}], "expand_timesteps with patch_size [1, 1"),
    ],
)
def test_configs_with_which_the_pipeline_would_run_as_another_model(pipeline, index, configs, message):
    with pytest.raises(InvalidInput) as caught:
        find_family(pipeline).check(index, configs)
    assert message in str(caught.value)


def test_text_tokens_beside_image_tokens_are_512():
    """WanAttnProcessor has this number in its code: with another one, text tokens would go through add_k_proj."""
    family = find_family(IMAGE_TO_VIDEO)
    family.check_sampling(sampling(max_sequence_length=226), I2V)
    with pytest.raises(InvalidInput, match="sampling.max_sequence_length: 226; .* allowed: 512"):
        family.check_sampling(sampling(max_sequence_length=226), IMAGE_TOKENS)
