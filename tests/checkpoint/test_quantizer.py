import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

import stepquant
from stepquant.checkpoint.linears import read_linear
from stepquant.checkpoint.writer import write_expert
from stepquant.errors import UnsupportedCheckpoint, UserError
from stepquant.evaluate.packed_layers import PackedExpert
from stepquant.models.weights import open_weights
from stepquant.runtime.linear import W4A4Linear

FORMATS = ("int4", "mxfp4", "nvfp4")
NO_DETAILS = {"rotations": {}, "eight_bit_format": None, "eight_bit_bins": {}}
FP32_MODULES = ("norm1", "norm2", "norm3", "scale_shift_table", "time_embedder")


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture(scope="module", params=FORMATS)
def packed(request, source, tools, tmp_path_factory):
    """Folder of a quantized low-noise expert, its settings and the packed linears it was written from."""
    stepquant.register()
    settings = tools.settings("transformer_2", request.param, request.param, rank=8)
    folder = tmp_path_factory.mktemp("packed") / request.param
    write_expert(
        source / "transformer_2",
        folder,
        settings,
        tools.blocks(source / "transformer_2", settings),
        dtype=torch.float32,
    )
    linears = {
        target: p for _, block in tools.blocks(source / "transformer_2", settings) for target, p in block.items()
    }
    return folder, settings, linears


@pytest.fixture
def damaged(source, tools, tmp_path):
    """A quantized expert in one safetensors file, and a function that rewrites its tensors or its config."""
    stepquant.register()
    settings = tools.settings("transformer", "int4", "int4", rank=0)
    write_expert(
        source / "transformer",
        tmp_path / "whole",
        settings,
        tools.blocks(source / "transformer", settings),
        dtype=torch.float32,
    )
    weights = open_weights(tmp_path / "whole")
    tensors = {key: weights.get(key).clone() for key in weights}
    config = json.loads((tmp_path / "whole" / "config.json").read_text())

    def load(change=None, **quantization_config):
        if change:
            change(tensors)
        config["quantization_config"] |= quantization_config
        folder = tmp_path / "damaged"
        folder.mkdir()
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return WanTransformer3DModel.from_pretrained(folder)

    return load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_tensors_load_bit_for_bit(packed, dtype):
    """Whatever torch_dtype is: it is the dtype of what is not quantized."""
    folder, settings, linears = packed
    model = WanTransformer3DModel.from_pretrained(folder, dtype=dtype)
    assert model.dtype == dtype
    for target in settings.targets:
        linear = model.get_submodule(target)
        assert isinstance(linear, W4A4Linear)
        for name, tensor in linears[target].tensors().items():
            loaded = getattr(linear, name)
            assert loaded.dtype == tensor.dtype, (target, name)
            assert torch.equal(bits(loaded), bits(tensor)), (target, name)
        assert linear.bias.dtype == torch.float32


def test_the_rest_loads_as_in_the_unquantized_model(packed, source):
    folder, settings, _ = packed
    model = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16)
    original = WanTransformer3DModel.from_pretrained(source / "transformer_2", dtype=torch.bfloat16)
    loaded = dict(model.named_parameters())
    for name, parameter in original.named_parameters():
        if name in loaded and name.removesuffix(".bias") not in settings.targets:
            assert loaded[name].dtype == parameter.dtype, name
            assert torch.equal(loaded[name], parameter), name
    kept = [name for name in loaded if any(part in name.split(".") for part in FP32_MODULES)]
    assert len(kept) > 8 and all(loaded[name].dtype == torch.float32 for name in kept)


def test_a_linear_computes_the_same_before_and_after(packed):
    folder, settings, linears = packed
    model = WanTransformer3DModel.from_pretrained(folder, dtype=torch.float32)
    expert = PackedExpert(folder, "cpu")
    for target in settings.targets:
        after = model.get_submodule(target)
        rotation, eight_bit_bins = settings.rotations.get(target, 0), settings.eight_bit_bins.get(target, ())
        before = W4A4Linear(after.in_features, after.out_features, True, settings, "cpu", rotation, eight_bit_bins)
        alone = read_linear(expert.weights, expert.settings, target, "cpu")
        before.load_state_dict(linears[target].tensors() | {"bias": after.bias})
        x = torch.randn(7, after.in_features, generator=torch.Generator().manual_seed(0))
        for bin_ in range(settings.bins):
            before.bin.set(bin_)
            after.bin.set(bin_)
            expected = before(x)
            assert torch.equal(after(x), expected), (target, bin_)
            assert torch.equal(expert.output([alone], x, bin_), expected), (target, bin_)


def test_packed_tensors_do_not_depend_on_eight_bits(packed, source, tools, tmp_path):
    folder, settings, _ = packed
    plain = replace(settings, eight_bit_format=None, eight_bit_bins={})
    blocks = tools.blocks(source / "transformer_2", plain)
    write_expert(source / "transformer_2", tmp_path / "plain", plain, blocks, dtype=torch.float32)
    names = sorted(file.name for file in folder.iterdir())
    different = [name for name in names if (folder / name).read_bytes() != (tmp_path / "plain" / name).read_bytes()]
    assert different == ["config.json"] and names == sorted(file.name for file in (tmp_path / "plain").iterdir())


def test_quantized_linear_is_close_to_the_original(packed, source):
    """Off by 4-bit rounding, a tenth or two; a wrong layout of codes or scales would be off by about 1."""
    folder, settings, _ = packed
    model = WanTransformer3DModel.from_pretrained(folder, dtype=torch.float32)
    original = WanTransformer3DModel.from_pretrained(source / "transformer_2", dtype=torch.float32)
    for target in settings.targets:
        linear, reference = model.get_submodule(target), original.get_submodule(target)
        x = torch.randn(256, linear.in_features, generator=torch.Generator().manual_seed(0))
        error = (linear(x) - reference(x)).norm() / (reference(x) - reference.bias).norm()
        assert 0.01 < error < 0.25, (target, error)


def test_the_timestep_sets_the_bin(packed, tools):
    folder, _, _ = packed
    model = WanTransformer3DModel.from_pretrained(folder, dtype=torch.float32)
    inputs = {"hidden_states": torch.zeros(1, 36, 2, 4, 4), "encoder_hidden_states": torch.zeros(1, 3, 128)}
    for t, expected in ((899, 0), (600, 1), (299, 2)):  # edges 900, 600, 300, 0
        model(**inputs, timestep=torch.tensor([t]))
        assert {m.bin.on(torch.device("cpu")).item() for m in model.modules() if isinstance(m, W4A4Linear)} == {
            expected
        }


def test_a_batch_of_mixed_timesteps_is_its_samples_one_by_one(packed):
    model = WanTransformer3DModel.from_pretrained(packed[0], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 36, 2, 4, 4, generator=generator)
    text, t = torch.randn(3, 4, 128, generator=generator), torch.tensor([899, 500, 20])  # one in each bin
    with torch.no_grad():
        alone = [model(latents[i : i + 1], t[i : i + 1], text[i : i + 1]).sample for i in range(3)]
        together = model(latents, t, text).sample
    # A 4-bit code may round the other way, because sums of a batch have another order.
    error = (together - torch.cat(alone)).norm() / torch.cat(alone).norm()
    assert error < 1e-3


def test_save_pretrained_round_trip(packed, tmp_path):
    folder, settings, _ = packed
    model = WanTransformer3DModel.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    first, second = model.state_dict(), again.state_dict()
    assert set(first) == set(second) == set(open_weights(tmp_path)) == set(open_weights(folder))
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype and torch.equal(bits(tensor), bits(second[key])), key
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_config"] == settings.to_config()


def test_dtype_of_a_loaded_model_is_fixed(packed):
    """diffusers' own guard for quantized models: casting would round scales and clips."""
    model = WanTransformer3DModel.from_pretrained(packed[0])
    with pytest.raises(ValueError, match="Casting a quantized model"):
        model.to(torch.bfloat16)


def test_missing_tensor(damaged):
    with pytest.raises(UserError, match="lacks 1 tensors, the first is 'blocks.0.attn1.to_q.wscales'"):
        damaged(lambda tensors: tensors.pop("blocks.0.attn1.to_q.wscales"))


def test_foreign_tensor(damaged):
    with pytest.raises(UserError, match="do not have, the first is 'blocks.0.attn1.to_q.wtscale'"):
        damaged(lambda tensors: tensors.update({"blocks.0.attn1.to_q.wtscale": torch.ones(1)}))


def test_wrong_shape(damaged):
    with pytest.raises(
        UserError, match=r"to_q.clip_ratio has shape \[2\]; quantization_config and config.json require \[3\]"
    ):
        damaged(lambda tensors: tensors.update({"blocks.0.attn1.to_q.clip_ratio": torch.ones(2)}))


def test_wrong_dtype(damaged):
    with pytest.raises(UserError, match="to_q.clip_ratio is torch.bfloat16; expected torch.float32"):
        damaged(lambda tensors: tensors.update({"blocks.0.attn1.to_q.clip_ratio": torch.ones(3).bfloat16()}))


def test_another_version(damaged):
    with pytest.raises(UnsupportedCheckpoint, match="version is 2, written by an older stepquant"):
        damaged(version=2)


def test_target_that_is_no_module(damaged):
    with pytest.raises(UserError, match="'blocks.7.attn1.to_q' is no module of WanTransformer3DModel"):
        damaged(targets=["blocks.7.attn1.to_q"], **NO_DETAILS)


def test_target_that_is_no_linear(damaged):
    with pytest.raises(UserError, match="'blocks.0.norm2' is a FP32LayerNorm; expected a linear"):
        damaged(targets=["blocks.0.norm2"], **NO_DETAILS)


def test_eight_bits_of_a_foreign_target(damaged):
    with pytest.raises(UserError, match="eight_bit_bins name 'blocks.0.norm2', which is not in targets"):
        damaged(eight_bit_bins={"blocks.0.norm2": [0]})


def test_single_file_loads_too(damaged):
    model = damaged()
    assert sum(isinstance(m, W4A4Linear) for m in model.modules()) == 20


def test_load_file_agrees(packed):
    """The safetensors library itself reads what the writer wrote."""
    folder, settings, linears = packed
    shard = load_file(folder / "diffusion_pytorch_model-00001-of-00003.safetensors")
    first = settings.targets[0]
    assert torch.equal(shard[f"{first}.qweight"], linears[first].qweight)
