"""What a checkpoint stores beside the quantized linears: dtypes by the source's and by that of the calibration."""

import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

import stepquant
from stepquant.checkpoint.rest import stored_dtype
from stepquant.checkpoint.writer import write_expert
from stepquant.models.denoiser import Denoiser
from stepquant.models.families import find_denoiser
from stepquant.models.weights import open_weights

WAN = find_denoiser("WanTransformer3DModel")
WEIGHTS = "diffusion_pytorch_model.safetensors"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FP8 = torch.float8_e4m3fn


def test_the_float32_modules_are_those_of_diffusers():
    assert set(WAN.float32) == set(WanTransformer3DModel._keep_in_fp32_modules)


@pytest.mark.parametrize(
    ("key", "found", "computed", "stored"),
    [
        ("proj_out.weight", FP32, BF16, BF16),
        ("proj_out.weight", FP32, FP16, FP16),
        ("proj_out.weight", FP32, FP32, FP32),
        ("proj_out.weight", torch.float64, FP32, FP32),
        ("proj_out.weight", BF16, FP32, BF16),
        ("proj_out.weight", FP16, BF16, FP16),
        ("proj_out.weight", FP8, BF16, BF16),
        ("proj_out.weight", torch.float8_e5m2, FP32, BF16),
        ("blocks.0.norm2.weight", FP32, BF16, FP32),
        ("blocks.0.scale_shift_table", FP32, BF16, FP32),
        ("condition_embedder.time_embedder.linear_1.weight", FP32, BF16, FP32),
        ("condition_embedder.time_proj.weight", FP32, BF16, BF16),
        ("counter", torch.int64, BF16, torch.int64),
    ],
)
def test_stored_dtype(key, found, computed, stored):
    assert stored_dtype(key, found, computed, WAN) == stored


def cast_source(source, out, change):
    """The source's transformer with every tensor changed."""
    shutil.copytree(source / "transformer", out)
    tensors = load_file(out / WEIGHTS)
    save_file({key: change(key, tensor) for key, tensor in tensors.items()}, out / WEIGHTS, metadata={"format": "pt"})
    return out


def pack(tools, source, out, *, mean_subtraction=True, dtype=BF16):
    settings = tools.settings("transformer", "int4", "int4", rank=0, mean_subtraction=mean_subtraction)
    write_expert(source, out, settings, tools.blocks(source, settings), dtype=dtype)
    return settings


@pytest.mark.parametrize("mean_subtraction", [True, False])
def test_a_float32_source_packed_in_bfloat16_loads_as_the_source_does(source, tools, tmp_path, mean_subtraction):
    """Equal to what diffusers makes of the source in that dtype, in half the bytes."""
    stepquant.register()
    settings = pack(tools, source / "transformer", tmp_path / "out", mean_subtraction=mean_subtraction)
    theirs = WanTransformer3DModel.from_pretrained(source / "transformer", dtype=BF16).state_dict()
    ours = WanTransformer3DModel.from_pretrained(tmp_path / "out", dtype=BF16).state_dict()
    stored, original = open_weights(tmp_path / "out"), open_weights(source / "transformer")
    quantized = tuple(f"{target}." for target in settings.targets)
    rest = [key for key in original if not key.startswith(quantized)]
    assert {stored.dtype(key) for key in rest} == {FP32, BF16}
    for key in rest:
        assert stored.dtype(key) == ours[key].dtype == theirs[key].dtype, key
        assert torch.equal(ours[key], theirs[key]), key
    for target in settings.targets:
        assert stored.dtype(f"{target}.bias") == ours[f"{target}.bias"].dtype == FP32
        if not mean_subtraction:
            assert torch.equal(ours[f"{target}.bias"], original.get(f"{target}.bias"))


def test_a_float32_run_keeps_the_rest_bit_for_bit(source, tools, tmp_path):
    settings = pack(tools, source / "transformer", tmp_path / "out", dtype=FP32)
    stored, original = open_weights(tmp_path / "out"), open_weights(source / "transformer")
    quantized = tuple(f"{target}." for target in settings.targets)
    for key in (key for key in original if not key.startswith(quantized)):
        assert stored.dtype(key) == FP32 and torch.equal(stored.get(key), original.get(key)), key


def in_fp8(key, tensor):
    """As fp8 files of finetunes are: weights and biases of the blocks; norms and tables stay."""
    return tensor.to(FP8) if key.endswith((".weight", ".bias")) and not WAN.keeps_float32(key) else tensor


@pytest.fixture
def fp8(source, tmp_path):
    folder = cast_source(source, tmp_path / "fp8", in_fp8)
    assert sum(open_weights(folder).dtype(key) == FP8 for key in open_weights(folder)) > 40
    return folder


@pytest.fixture
def upcast(source, tmp_path):
    """The same values in float32, which is exact."""
    return cast_source(source, tmp_path / "upcast", lambda key, tensor: in_fp8(key, tensor).float())


def test_an_fp8_source_is_read_and_replayed_exactly(fp8, upcast):
    ours, reference = Denoiser(fp8, "cpu", FP32), WanTransformer3DModel.from_pretrained(upcast, dtype=FP32)
    for index in range(2):
        for linear in ("attn1.to_q", "ffn.net.2"):
            theirs = reference.get_submodule(f"blocks.{index}.{linear}")
            assert torch.equal(ours.linear_weight(index, linear), theirs.weight)
            assert torch.equal(ours.linear_bias(index, linear).float(), theirs.bias)
    for name, parameter in reference.blocks[1].state_dict().items():
        assert torch.equal(ours.block(1).state_dict()[name], parameter), name
    for name, parameter in ours.glue().model.state_dict().items():
        assert torch.equal(reference.state_dict()[name], parameter), name


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_an_fp8_source_packs_as_its_values_in_float32_do(fp8, upcast, tools, tmp_path, dtype):
    """diffusers leaves fp8 tensors of quantized models as they are, so none may be in a checkpoint."""
    stepquant.register()
    models = []
    for name, folder in (("a", fp8), ("b", upcast)):
        pack(tools, folder, tmp_path / name, dtype=dtype)
        assert not any(open_weights(tmp_path / name).dtype(key) == FP8 for key in open_weights(tmp_path / name))
        models.append(WanTransformer3DModel.from_pretrained(tmp_path / name, dtype=dtype))
    ours, reference = (model.state_dict() for model in models)
    for key, tensor in reference.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
