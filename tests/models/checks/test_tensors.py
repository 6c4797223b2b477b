"""Every tensor of every component against its class, from headers."""

import time

import pytest
import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from stepquant.models.checks import check_source
from stepquant.models.checks.components import Component
from stepquant.models.checks.tensors import check_tensors
from tests.wan import BLOCKS

LAST = f"blocks.{BLOCKS - 1}."


def fp8(tensors, parts):
    for key in tensors:
        if any(part in key for part in parts):
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)


def test_more_blocks_in_the_file_than_the_config_says(source):
    source.configure("transformer/config.json", num_layers=1)
    message = f"the weights have {BLOCKS} of 'blocks', config.json describes 1; use the config.json that belongs to"
    assert source.refusal().startswith(f"{source / 'transformer'}: {message}")


def test_fewer_blocks_in_the_file(source):
    source.configure("transformer_2/config.json", num_layers=BLOCKS + 3)
    message = f"the weights have {BLOCKS} of 'blocks', config.json describes {BLOCKS + 3}; "
    assert source.refusal().startswith(f"{source / 'transformer_2'}: {message}")


@pytest.mark.parametrize(
    ("component", "stack", "change"),
    [
        ("text_encoder", "encoder.block", {"num_layers": 1}),
        ("vae", "decoder.up_blocks", {"dim_mult": [1, 1], "temperal_downsample": [True]}),
    ],
)
def test_another_number_of_layers_in_the_other_components(source, component, stack, change):
    source.configure(f"{component}/config.json", **change)
    if component == "vae":  # the factors must agree with the layers
        source.configure("vae/config.json", scale_factor_spatial=2, scale_factor_temporal=2)
        source.configure("transformer/config.json", in_channels=34)
        source.configure("transformer_2/config.json", in_channels=34)
    assert source.refusal().startswith(f"{source / component}: ")


@pytest.mark.parametrize("component", ["transformer", "transformer_2", "text_encoder", "vae"])
def test_a_tensor_that_is_missing_or_unknown(source, component):
    taken = {}

    def drop(tensors):
        key = next(key for key in sorted(tensors) if "norm" in key)
        taken[key] = tensors.pop(key)

    source.retensor(component, drop)
    (key,) = taken
    assert source.refusal().startswith(f"{source / component}: no tensor {key!r}; expected the weights of a ")
    source.retensor(component, lambda tensors: tensors.update({key: taken[key], "more.weight": torch.zeros(3)}))
    assert source.refusal().startswith(f"{source / component}: unknown tensor 'more.weight'; expected the weights of ")


def test_a_tensor_of_another_shape(source):
    for component, key, shape in (
        ("transformer", "patch_embedding.bias", 64),
        ("text_encoder", "encoder.final_layer_norm.weight", 32),
    ):
        kept = {}
        source.retensor(
            component, lambda tensors: kept.update({key: tensors[key]}) or tensors.update({key: torch.zeros(7)})
        )
        assert source.refusal() == (
            f"{source / component}: tensor {key!r} has shape [7], config.json describes [{shape}]"
        )
        source.retensor(component, lambda tensors: tensors.update(kept))


def test_fp8_without_scales_is_a_legal_source(source):
    source.retensor("transformer", lambda tensors: fp8(tensors, ["blocks."]))
    source.retensor("text_encoder", lambda tensors: fp8(tensors, [".layer."]))
    check_source(source.folder)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "input_scale", "weight.absmax"])
@pytest.mark.parametrize("component", ["transformer_2", "text_encoder"])
def test_scaled_fp8_is_refused(source, component, name):
    def scale(tensors):
        fp8(tensors, ["blocks.", ".layer."])
        first = next(key for key in sorted(tensors) if key.endswith(".weight")).removesuffix("weight")
        tensors[f"{first}{name}"] = torch.ones(1)

    source.retensor(component, scale)
    message = source.refusal()
    assert message.startswith(f"{source / component}: tensor ") and f"{name}': these weights are scaled" in message


def test_the_marker_of_scaled_fp8(source):
    source.retensor("transformer", lambda tensors: tensors.update(scaled_fp8=torch.zeros(2).to(torch.float8_e4m3fn)))
    assert source.refusal().startswith(f"{source / 'transformer'}: tensor 'scaled_fp8': these weights are scaled")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_a_dtype_that_is_no_number_by_itself(source, component, dtype):
    def convert(tensors):
        key = next(key for key in sorted(tensors) if key.endswith(".weight"))
        tensors[key] = tensors[key].to(dtype)

    source.retensor(component, convert)
    assert f" is {str(dtype).removeprefix('torch.')}; allowed: float64, float32, " in source.refusal()


def test_what_the_class_itself_ignores_may_be_there(source):
    """norm_added_q of Wan2.1-I2V (WanTransformer3DModel._keys_to_ignore_on_load_unexpected)."""
    extra = {"blocks.0.attn2.norm_added_q.weight": torch.zeros(64)}
    source.retensor("transformer", lambda tensors: tensors.update(extra))
    check_source(source.folder)


@pytest.mark.parametrize("keep", ["shared.weight", "encoder.embed_tokens.weight", None])
def test_tied_weights_may_be_stored_once_or_twice_but_not_never(source, keep):
    names = ("shared.weight", "encoder.embed_tokens.weight")

    def tie(tensors):
        table = next(tensors[name] for name in names if name in tensors)
        for name in names:
            tensors.pop(name, None)
        if keep:
            tensors[keep] = table

    source.retensor("text_encoder", tie)
    if keep:
        check_source(source.folder)
    else:
        assert "no tensor " in source.refusal()


def test_a_config_that_its_class_refuses(source):
    source.configure("transformer/config.json", num_attention_heads="many")
    message = "transformer/config.json: WanTransformer3DModel cannot be built from it: "
    assert message in source.refusal()


def test_the_real_sizes_take_seconds(tmp_path):
    """The denoiser and the text encoder of Wan2.2-I2V-A14B: 14.3e9 and 5.7e9 parameters, as sparse files."""
    with torch.device("meta"):
        denoiser = WanTransformer3DModel(in_channels=36)
        config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        encoder = UMT5EncoderModel(config)
    components = [
        Component("transformer", tmp_path / "transformer", "diffusers", "WanTransformer3DModel"),
        Component("text_encoder", tmp_path / "text_encoder", "transformers", "UMT5EncoderModel"),
    ]
    for component, model in zip(components, (denoiser, encoder)):
        component.folder.mkdir()
        model.save_config(component.folder) if model is denoiser else config.save_pretrained(component.folder)
        write_sparse(component.folder / "model.safetensors", model)
    start = time.perf_counter()
    for component in components:
        check_tensors(component)
    assert time.perf_counter() - start < 10


def write_sparse(file, model):
    """A safetensors file with the model's float32 tensors, of which only the header takes space on disk."""
    import json
    import struct

    header, end = {}, 0
    for key, tensor in model.state_dict().items():
        start, end = end, end + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        out.truncate(8 + len(raw) + end)
