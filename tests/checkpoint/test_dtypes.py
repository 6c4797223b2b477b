"""Which dtype the tensors of a loaded pipeline have, and that no way of casting it rounds what must not be rounded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image

import stepquant
from benchmarks.local_compute import local_compute
from stepquant.checkpoint.writer import write_expert
from stepquant.errors import InvalidInput
from stepquant.models.source import load_source_pipeline
from stepquant.runtime.linear import W4A4Linear

NO_TEXT = {"text_encoder": None, "tokenizer": None}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["int4", "mxfp4", "nvfp4"])
def expert(request, source, tools, tmp_path_factory):
    """The folder of a packed expert that has every kind of tensor of its format."""
    stepquant.register()
    settings = tools.settings("transformer", request.param, request.param, rank=8)
    folder = tmp_path_factory.mktemp("expert") / request.param
    blocks = tools.blocks(source / "transformer", settings)
    write_expert(source / "transformer", folder, settings, blocks, dtype=torch.float32)
    return folder


def tensors(model):
    """Every tensor of the quantized linears, copied."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, W4A4Linear)}
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, linear in linears.items()
        for key, tensor in (*linear.named_parameters(), *linear.named_buffers())
    }


def assert_kept(model, before):
    after = tensors(model)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def call(model):
    dtype = model.patch_embedding.weight.dtype
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 36, 2, 4, 4, generator=generator).to(dtype)
    text = torch.randn(1, 3, 128, generator=generator).to(dtype)
    with torch.no_grad():
        return model(latents, torch.tensor([940]), text).sample


# What users call, and whether diffusers refuses it for quantized models.
CASTS = {
    "model.to": (lambda model: model.to(torch.bfloat16), True),
    "model.half": (lambda model: model.half(), True),
    "model.float": (lambda model: model.float(), True),
    "model.bfloat16": (lambda model: model.bfloat16(), False),
    "model.double": (lambda model: model.double(), False),
    "model.type": (lambda model: model.type(torch.float16), False),
    "blocks.to": (lambda model: model.blocks.to(torch.float16), False),
    "blocks.half": (lambda model: model.blocks.half(), False),
    "linear.to": (lambda model: model.blocks[0].attn1.to_q.to("cpu", torch.bfloat16), False),
    "layerwise": (lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), False),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_keep_every_quantized_tensor(expert, cast):
    model = WanTransformer3DModel.from_pretrained(expert)
    before, (change, refused) = tensors(model), CASTS[cast]
    assert {torch.float32, torch.bfloat16, torch.int8} <= {tensor.dtype for tensor in before.values()}
    if refused:
        with pytest.raises(ValueError, match="quantized model"):
            change(model)
    else:
        change(model)
    assert_kept(model, before)


def test_layerwise_casting_keeps_them_through_a_call(expert):
    """Its hook casts each linear before and after its forward."""
    model = WanTransformer3DModel.from_pretrained(expert)
    before = tensors(model)
    quantized_only = tuple(
        n for n, m in model.named_modules() if n and not isinstance(m, W4A4Linear) and not [*m.children()]
    )
    expected = call(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=quantized_only)
    assert torch.equal(call(model), expected)
    assert_kept(model, before)


@pytest.mark.parametrize("cast", ["bf16", "device and dtype", "keyword"])
def test_casting_the_pipeline_is_refused(packed_pipeline, cast):
    pipe = stepquant.load_pipeline(packed_pipeline, dtype="float32", **NO_TEXT)
    before = tensors(pipe.transformer)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        {
            "bf16": lambda: pipe.to(torch.bfloat16),
            "device and dtype": lambda: pipe.to("cpu", torch.float16),
            "keyword": lambda: pipe.to(dtype=torch.float16),
        }[cast]()
    assert_kept(pipe.transformer, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loading_in_any_dtype_keeps_them(packed_pipeline, dtype):
    stepquant.register()
    before = tensors(WanTransformer3DModel.from_pretrained(packed_pipeline / "transformer"))
    pipe = WanImageToVideoPipeline.from_pretrained(packed_pipeline, dtype=dtype, **NO_TEXT)
    assert_kept(pipe.transformer, before)
    assert pipe.transformer.dtype == dtype
    assert call(pipe.transformer).dtype == dtype


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16"], ids=str)
def test_one_dtype_leaves_the_vae_in_float32(packed_pipeline, given):
    pipe = stepquant.load_pipeline(packed_pipeline, dtype=given, **NO_TEXT)
    assert (pipe.transformer.dtype, pipe.transformer_2.dtype, pipe.vae.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


def test_a_dtype_per_component(packed_pipeline):
    dtype = {"default": torch.float32, "transformer_2": "bfloat16", "vae": "float16"}
    pipe = stepquant.load_pipeline(packed_pipeline, dtype=dtype, **NO_TEXT)
    assert (pipe.transformer.dtype, pipe.transformer_2.dtype, pipe.vae.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )


ALLOWED = "allowed: torch.float32, torch.bfloat16, torch.float16, or their names"


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("bf16", f"dtype is 'bf16'; {ALLOWED}"),
        ("auto", f"dtype is 'auto'; {ALLOWED}"),
        (None, f"dtype is None; {ALLOWED}"),
        (16, f"dtype is 16; {ALLOWED}"),
        (torch.int8, f"dtype is torch.int8; {ALLOWED}"),
        (torch.float8_e4m3fn, f"dtype is torch.float8_e4m3fn; {ALLOWED}"),
        ({"default": "half"}, f"dtype['default'] is 'half'; {ALLOWED}"),
        ({"default": torch.float32, "vae": int}, f"dtype['vae'] is <class 'int'>; {ALLOWED}"),
        ({"vae": torch.float32}, "dtype: no 'default' among 'vae'; expected one"),
        ({}, "dtype: no 'default'"),
        (
            {"default": torch.float32, "tranformer": torch.float32},
            "dtype: the pipeline has no component 'tranformer'; allowed: default, ",
        ),
    ],
    ids=repr,
)
def test_any_other_dtype_is_refused(packed_pipeline, dtype, message):
    """diffusers loads float32 with a warning instead."""
    with pytest.raises(InvalidInput) as refused:
        stepquant.load_pipeline(packed_pipeline, dtype=dtype, **NO_TEXT)
    assert message in str(refused.value)


def test_the_source_pipeline_of_a_bfloat16_run_decodes_in_float32(tmp_path):
    compute = local_compute("bfloat16")
    pipe = load_source_pipeline(ROOT / "data/models/wan22-mini", [], compute, tmp_path)
    assert (pipe.transformer.dtype, pipe.transformer_2.dtype, pipe.vae.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


def test_a_bfloat16_video_is_the_float32_decoding_of_its_latents(packed_pipeline):
    """The first frame is encoded, and the latents are decoded, by the VAE in float32 (diffusers casts between)."""
    pipe = stepquant.load_pipeline(packed_pipeline, dtype="bfloat16", **NO_TEXT)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].dtype), with_kwargs=True
    )

    def sample(output_type):
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randn(1, 5, 128, generator=generator)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
        size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
        prompts = {"prompt_embeds": prompt, "negative_prompt_embeds": -prompt}
        return pipe(image=image, **prompts, **size, generator=generator, output_type=output_type).frames

    latents, video = sample("latent"), sample("pt")
    assert {seen[0], seen[-1]} == {torch.float32, torch.bfloat16}
    config, shape = pipe.vae.config, (1, -1, 1, 1, 1)
    mean, std = torch.tensor(config.latents_mean).view(shape), torch.tensor(config.latents_std).view(shape)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents.float() * std + mean, return_dict=False)[0]
    expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4)
    torch.testing.assert_close(video, expected, rtol=1e-4, atol=1e-4)


def test_a_pipeline_without_a_vae(packed_pipeline):
    pipe = stepquant.load_pipeline(packed_pipeline, dtype="bfloat16", vae=None, **NO_TEXT)
    assert pipe.vae is None and pipe.transformer.dtype == torch.bfloat16
