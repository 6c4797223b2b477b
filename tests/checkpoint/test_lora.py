"""LoRAs beside the quantized linears, by diffusers and PEFT. Expected outputs: packed output + scale * up(down(x))."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import stepquant
from stepquant.errors import InvalidInput
from stepquant.runtime.linear import W4A4Linear

NO_TEXT = {"text_encoder": None, "tokenizer": None}
RANK = 3
QUANTIZED = ("blocks.0.attn1.to_q", "blocks.0.attn2.to_out.0", "blocks.1.ffn.net.2")
# proj_out is not quantized: a LoRA may have both kinds.
TARGETS = (*QUANTIZED, "proj_out")
SITE = QUANTIZED[0]


@pytest.fixture
def pipe(packed_pipeline):
    return stepquant.load_pipeline(packed_pipeline, dtype="float32", **NO_TEXT)


def lora(denoiser, seed):
    """A LoRA file's content, in diffusers' key format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in TARGETS:
        linear = denoiser.get_submodule(target)
        tensors[f"transformer.{target}.lora_A.weight"] = 0.1 * torch.randn(
            RANK, linear.in_features, generator=generator
        )
        tensors[f"transformer.{target}.lora_B.weight"] = 0.1 * torch.randn(
            linear.out_features, RANK, generator=generator
        )
    return tensors


def delta(tensors, target, x):
    """up(down(x)), without PEFT."""
    return (
        x
        @ tensors[f"transformer.{target}.lora_A.weight"].T.to(x.dtype)
        @ tensors[f"transformer.{target}.lora_B.weight"].T.to(x.dtype)
    )


def inputs(linear, dtype=torch.float32):
    return torch.randn(2, 5, linear.in_features, generator=torch.Generator().manual_seed(9)).to(dtype)


def outputs(denoiser):
    """What the denoiser gives in two timestep bins."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 36, 2, 4, 4, generator=generator).to(denoiser.dtype)
    text = torch.randn(1, 3, 128, generator=generator).to(denoiser.dtype)
    with torch.no_grad():
        return [denoiser(latents, torch.tensor([t]), text).sample for t in (960, 910)]


def same(first, second):
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_load_scale_switch_disable_and_unload(pipe, expert):
    denoiser = getattr(pipe, expert)
    before, other = outputs(denoiser), outputs(pipe.transformer_2 if expert == "transformer" else pipe.transformer)
    x = {target: inputs(denoiser.get_submodule(target)) for target in TARGETS}
    plain = {target: denoiser.get_submodule(target)(x[target]) for target in TARGETS}  # in the bin of the last call
    style, motion = lora(denoiser, 1), lora(denoiser, 2)

    def check(style_weight, motion_weight):
        for target in TARGETS:
            expected = plain[target] + style_weight * delta(style, target, x[target])
            expected = expected + motion_weight * delta(motion, target, x[target])
            torch.testing.assert_close(denoiser.get_submodule(target)(x[target]), expected, rtol=1e-5, atol=1e-5)

    second = {"load_into_transformer_2": expert == "transformer_2"}
    pipe.load_lora_weights(dict(style), adapter_name="style", **second)
    check(1.0, 0.0)
    pipe.load_lora_weights(dict(motion), adapter_name="motion", **second)
    for weights in ((0.25, 2.0), (1.0, -0.5)):
        pipe.set_adapters(["style", "motion"], list(weights))
        check(*weights)
    pipe.set_adapters("motion", 0.7)
    check(0.0, 0.7)
    assert not same(outputs(denoiser), before)  # the last call sets the same bin again
    pipe.disable_lora()
    assert same(outputs(denoiser), before)
    pipe.enable_lora()
    check(0.0, 0.7)
    pipe.delete_adapters("motion")
    pipe.set_adapters("style", 1.0)
    check(1.0, 0.0)
    assert same(outputs(pipe.transformer_2 if expert == "transformer" else pipe.transformer), other)
    pipe.unload_lora_weights()
    assert same(outputs(denoiser), before)
    assert type(denoiser.get_submodule(SITE)) is W4A4Linear


def test_in_bfloat16(packed_pipeline):
    pipe = stepquant.load_pipeline(packed_pipeline, dtype="bfloat16", **NO_TEXT)
    linear = pipe.transformer.get_submodule(SITE)
    x = inputs(linear, torch.bfloat16)
    plain, tensors = linear(x), lora(pipe.transformer, 1)
    pipe.load_lora_weights(dict(tensors), adapter_name="style")
    layer = pipe.transformer.get_submodule(SITE)
    assert layer.lora_A["style"].weight.dtype == torch.bfloat16  # as in the unquantized model
    expected = plain.float() + delta(tensors, SITE, x.float())
    assert (layer(x).float() - expected).norm() < 2**-7 * expected.norm()


def test_no_memory_for_the_weight(pipe):
    linear = pipe.transformer.get_submodule(SITE)
    names = {name for name, _ in linear.named_parameters()} | {name for name, _ in linear.named_buffers()}
    assert "weight" not in names and "weight" not in linear.state_dict()
    weight = linear.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((128, 128), torch.float32, "cpu")
    assert "AbsentWeight" in repr(weight)


FUSING = {
    "pipe.fuse_lora": lambda pipe, layer: pipe.fuse_lora(components=["transformer"], lora_scale=0.5),
    "safe": lambda pipe, layer: pipe.fuse_lora(components=["transformer"], safe_fusing=True),
    "model.fuse_lora": lambda pipe, layer: pipe.transformer.fuse_lora(),
    "merge": lambda pipe, layer: layer.merge(),
    "safe merge": lambda pipe, layer: layer.merge(safe_merge=True),
    "qkv": lambda pipe, layer: pipe.transformer.fuse_qkv_projections(),
    "kv": lambda pipe, layer: pipe.transformer.blocks[0].attn2.fuse_projections(),
    "in place": lambda pipe, layer: layer.get_base_layer().weight.add_(1),
    "data": lambda pipe, layer: setattr(layer.get_base_layer().weight, "data", torch.zeros(2, 2)),
    "read": lambda pipe, layer: layer.get_base_layer().weight.float(),
}


@pytest.fixture(scope="module")
def fused_nothing(packed_pipeline):
    """A pipeline with a LoRA, which every way of fusing must leave as it is."""
    pipe = stepquant.load_pipeline(packed_pipeline, dtype="float32", **NO_TEXT)
    pipe.load_lora_weights(lora(pipe.transformer, 1), adapter_name="style")
    return pipe, outputs(pipe.transformer)


@pytest.mark.parametrize("way", FUSING)
def test_fusing_is_refused_with_the_reason_and_changes_nothing(fused_nothing, way):
    pipe, before = fused_nothing
    with pytest.raises(InvalidInput, match="4.bit.*fuse (it|them) into the source model before it is quantized"):
        FUSING[way](pipe, pipe.transformer.get_submodule(SITE))
    assert same(outputs(pipe.transformer), before)


def test_unload_with_merge_is_refused(pipe):
    """PEFT's merge_and_unload: it merges every layer and puts the base layer back."""
    pipe.load_lora_weights(lora(pipe.transformer, 1), adapter_name="style")
    layers = [m for m in pipe.transformer.modules() if isinstance(m, BaseTunerLayer)]
    quantized = [layer for layer in layers if isinstance(layer.get_base_layer(), W4A4Linear)]
    assert len(quantized) == len(QUANTIZED)
    for layer in quantized:
        with pytest.raises(InvalidInput, match="weight of a quantized linear: it has no values"):
            layer.merge(safe_merge=False, adapter_names=["style"])


def test_a_dora_is_refused_and_leaves_the_pipeline_as_it_was(pipe):
    """Its scale is the norm of the weight's columns, which are not stored."""
    before, tensors = outputs(pipe.transformer), lora(pipe.transformer, 1)
    tensors[f"transformer.{SITE}.lora_magnitude_vector"] = torch.ones(128)
    with pytest.raises(InvalidInput, match="weight of a quantized linear"):
        pipe.load_lora_weights(tensors, adapter_name="dora")
    assert same(outputs(pipe.transformer), before)
