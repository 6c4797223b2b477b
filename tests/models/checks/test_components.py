"""Every component that the pipeline class needs is there, of its class, and not quantized."""

import json
import shutil

import pytest
import torch

from stepquant.models.checks import check_source
from tests.models.checks.conftest import INDEX


def test_a_whole_pipeline_passes(source):
    check_source(source.folder)


@pytest.mark.parametrize("name", ["vae", "text_encoder", "tokenizer", "scheduler"])
@pytest.mark.parametrize("value", [None, [None, None], "absent"])
def test_a_component_that_is_null_or_not_named(source, name, value):
    index = INDEX | {name: value}
    if value == "absent":
        del index[name]
    (source / "model_index.json").write_text(json.dumps(index))
    expected = f"{source / 'model_index.json'}: {name} is null or missing; WanImageToVideoPipeline needs it"
    assert source.refusal() == expected


@pytest.mark.parametrize("name", [name for name in INDEX if isinstance(INDEX[name], list) and INDEX[name][0]])
def test_a_folder_that_is_missing(source, name):
    shutil.rmtree(source / name)
    message = f"{source / name}: no such folder, but {source / 'model_index.json'} names this component"
    assert source.refusal() == message


@pytest.mark.parametrize("name", ["vae", "transformer_2", "tokenizer"])
def test_a_folder_that_is_a_link(source, tmp_path, name):
    (source / name).rename(tmp_path / "elsewhere")
    (source / name).symlink_to(tmp_path / "elsewhere")
    check_source(source.folder)
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    assert source.refusal().startswith(f"{source / name}: a link to {tmp_path / 'elsewhere'}, which is not there")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("vae", ["diffusers", "AutoencoderKL"], "vae is a AutoencoderKL; allowed: AutoencoderKLWan"),
        ("vae", ["diffusers", "AsymmetricAutoencoderKL"], "vae is a AsymmetricAutoencoderKL; allowed: "),
        ("text_encoder", ["transformers", "T5EncoderModel"], "text_encoder is a T5EncoderModel; allowed: UMT5Encoder"),
        ("transformer", ["diffusers", "WanVACETransformer3DModel"], "transformer is a WanVACETransformer3DModel; "),
        ("transformer", ["my_code", "MyTransformer"], "transformer is a MyTransformer; allowed: WanTransformer3DModel"),
        ("tokenizer", ["transformers", "NoSuchTokenizer"], "transformers has no class NoSuchTokenizer"),
        ("vae", ["my_code", "AutoencoderKLWan"], "vae is of my_code; allowed: diffusers, transformers"),
        ("vae", "AutoencoderKLWan", "vae is 'AutoencoderKLWan'; expected [library, class], or [null, null]"),
        ("safety_checker", ["diffusers", "SafetyChecker"], "names the component safety_checker, which Wan"),
    ],
)
def test_a_component_of_another_class(source, name, value, message):
    source.configure("model_index.json", **{name: value})
    assert source.refusal().startswith(f"{source.folder}/") and message in source.refusal()


def test_a_config_of_another_class_than_the_index_says(source):
    source.configure("transformer/config.json", _class_name="WanVACETransformer3DModel")
    message = "_class_name 'WanVACETransformer3DModel', but model_index.json says WanTransformer3DModel"
    assert source.refusal() == f"{source / 'transformer/config.json'}: {message}"


@pytest.mark.parametrize("pipeline", ["WanVACEPipeline", "WanAnimatePipeline", "SkyReelsV2ImageToVideoPipeline", None])
def test_a_pipeline_class_that_is_not_known(source, pipeline):
    source.configure("model_index.json", _class_name=pipeline)
    assert f"_class_name {pipeline!r} is not supported" in source.refusal()


@pytest.mark.parametrize(
    ("component", "quantization", "method"),
    [
        ("text_encoder", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, None),
        ("transformer", {"quant_method": "torchao"}, None),
        ("transformer_2", {"quant_method": "gguf"}, None),
        ("vae", {"quant_method": "quanto"}, None),
        ("text_encoder", {}, "None"),
    ],
)
def test_a_component_that_is_quantized_already(source, component, quantization, method):
    source.configure(f"{component}/config.json", quantization_config=quantization)
    assert source.refusal() == (
        f"{source / component / 'config.json'}: quantization_config: quantized already "
        f"({method or quantization['quant_method']}); model.source must have unquantized weights in every component"
    )


def test_a_packed_checkpoint_of_our_own(source):
    source.configure("transformer/config.json", quantization_config={"quant_method": "stepquant", "version": 1})
    assert source.refusal() == (
        f"{source / 'transformer'}: already quantized by stepquant; model.source must be the pipeline that it was made "
        "from"
    )


def test_two_sets_of_weights(source):
    """A finetune saved beside the shards it came from: diffusers reads the shards, transformers the file."""
    (source / "text_encoder/model.safetensors.index.json").write_text('{"weight_map": {}}')
    message = "has model.safetensors and model.safetensors.index.json; remove the one that is not meant"
    assert source.refusal() == f"{source / 'text_encoder'}: {message}"


def test_a_tokenizer_without_files(source):
    (source / "tokenizer/tokenizer.json").unlink()
    assert source.refusal().startswith(f"{source / 'tokenizer'}: no tokenizer; expected one of tokenizer.json, ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundary_ratio": None}, "a transformer_2 but no boundary_ratio"),
        ({"transformer_2": [None, None]}, "boundary_ratio 0.9 but no transformer_2"),
    ],
)
def test_boundary_ratio_and_transformer_2_belong_together(source, change, message):
    source.configure("model_index.json", **change)
    assert source.refusal().startswith(f"{source / 'model_index.json'}: {message}")
    assert "boundary_ratio" in source.refusal() and "transformer_2" in source.refusal()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vae/config.json", {"scale_factor_spatial": 16}, "scale_factor_spatial is 16, but its layers make 8"),
        ("vae/config.json", {"scale_factor_temporal": 8}, "scale_factor_temporal is 8, but its layers make 4"),
        ("vae/config.json", {"z_dim": 48}, "in_channels 36 and out_channels 16; with the VAE's 48 latent channels"),
        ("text_encoder/config.json", {"d_model": 64}, "text_dim is 32, but text_encoder/config.json has d_model 64"),
    ],
)
def test_configs_that_contradict_each_other(source, file, change, message):
    source.configure(file, **change)
    assert source.refusal().startswith(str(source.folder)) and message in source.refusal()


def test_weights_that_are_pickled(source):
    source.weights("vae").unlink()
    torch.save({}, source / "vae/diffusion_pytorch_model.bin")
    assert "found only pickled weights (diffusion_pytorch_model.bin)" in source.refusal()
