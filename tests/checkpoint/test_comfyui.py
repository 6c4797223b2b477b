"""The ComfyUI export of a tiny two-expert Wan: every linear of the files, computed by comfy-kitchen, equals ours."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear
from typer.testing import CliRunner

from stepquant import cli
from stepquant.checkpoint.exporters.comfyui import export_comfyui, plan_export
from stepquant.checkpoint.linears import read_linear, read_settings
from stepquant.checkpoint.packed import PackedLinear, pack_linear
from stepquant.checkpoint.writer import write_checkpoint
from stepquant.errors import UserError
from stepquant.formats import Scales, get_format, weight_scales
from stepquant.models.single_file import import_files
from stepquant.models.weights import open_weights
from stepquant.quantize.rotate import REGULAR, rotate
from stepquant.runtime.layout import QuantizationSettings
from tests.native_wan import native_name
from tests.peers import import_peer
from tests.wan import SITES

kitchen = import_peer("comfy_kitchen.tensor")
WIDTH, BLOCKS = 256, 2
EXPERTS = {"high_noise": "transformer", "low_noise": "transformer_2"}
TARGETS = tuple(f"blocks.{i}.{name}" for i in range(BLOCKS) for site in SITES for name in site.linears)
SETTINGS = QuantizationSettings(
    *("asym_w4a8", "int8_row", "ceil", "absmax", 0, False, dict.fromkeys(TARGETS, 256), (1000.0, 900.0), TARGETS),
    hadamard=REGULAR,
)
# SHA-256 of each file of the fixed checkpoint below.
GOLDEN = "60751541edd6df78b427b24bbd3b20fa3ac88bb050315e7d497a77191bf2d716"


def denoiser(seed: int) -> WanTransformer3DModel:
    """All parameters random, in the dtypes of a BF16 source."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=2 * WIDTH,
        num_layers=BLOCKS,
        rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A pipeline of two experts and a scheduler; nothing else is read."""
    folder = tmp_path_factory.mktemp("source")
    model, scheduler = ["diffusers", "WanTransformer3DModel"], ["diffusers", "UniPCMultistepScheduler"]
    index = {"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9, "scheduler": scheduler}
    for seed, subfolder in enumerate(EXPERTS.values()):
        denoiser(seed).save_pretrained(folder / subfolder)
        index[subfolder] = model
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    config = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": True}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return folder


def blocks(folder: Path, settings: QuantizationSettings, **changed: Tensor) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every linear rounded to nearest; some of its tensors changed."""
    weights, fmt = open_weights(folder), get_format(settings.weight_format)
    for index in range(BLOCKS):
        packed = {}
        for target in (target for target in settings.targets if target.startswith(f"blocks.{index}.")):
            W = rotate(weights.get(f"{target}.weight").float(), settings.rotations.get(target, 0), settings.hadamard)
            scales = weight_scales(fmt, W, rounding="ceil")
            ones = torch.ones(W.shape[1], dtype=torch.bfloat16)
            found = pack_linear(fmt.encode(W, scales), scales, ones, clip_ratio=torch.ones(settings.bins))
            packed[target] = replace(found, **changed)
        yield index, packed


def pack(source: Path, out: Path, settings: QuantizationSettings = SETTINGS, **changed: Tensor) -> Path:
    experts = {name: (settings, blocks(source / name, settings, **changed)) for name in EXPERTS.values()}
    write_checkpoint(source, out, experts, dtype=torch.bfloat16, flow_shift=5.0)
    return out


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory) -> Path:
    return pack(source, tmp_path_factory.mktemp("checkpoint") / "full")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "wan"
    export_comfyui(checkpoint, out, plan_export(checkpoint, out))
    return out


def layers(file: Path) -> dict[str, dict[str, Any]]:
    """The quantized layers by the file's own metadata."""
    with safe_open(file, framework="pt") as opened:
        found: dict[str, dict[str, Any]] = json.loads(opened.metadata()["_quantization_metadata"])["layers"]
    return found


def comfy_weight(tensors: dict[str, Tensor], name: str, conf: dict[str, Any]) -> Tensor:
    """What ComfyUI's `_load_quantized_module` makes of a layer."""
    assert conf["format"] == "asym_w4a8_int8"
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_s_rel"]
    params = kitchen.AsymW4A8Int8Layout.Params(
        scale=scale,
        s_channel=tensors[f"{name}.weight_s_channel"],
        codebook=tensors[f"{name}.weight_codebook"],
        group_size=conf["group_size"],
        convrot_groupsize=conf["convrot_groupsize"],
        orig_dtype=torch.float32,
        orig_shape=(len(weight), 2 * weight.shape[1]),
    )
    return kitchen.QuantizedTensor(weight, "AsymW4A8Int8Layout", params)


@pytest.mark.parametrize("expert", EXPERTS)
def test_every_linear_computed_by_comfy_kitchen_is_ours(checkpoint, exported, expert):
    """To the rounding of float32 sums, as a part of the sum of magnitudes."""
    file, folder = exported / f"wan_{expert}.safetensors", checkpoint / EXPERTS[expert]
    tensors, settings, weights = load_file(file), read_settings(folder), open_weights(folder)
    described = layers(file)
    assert described.keys() == {native_name(target) for target in TARGETS} and len(described) == 10 * BLOCKS
    generator = torch.Generator().manual_seed(0)
    for target in TARGETS:
        ours, name = read_linear(weights, settings, target, "cpu"), native_name(target)
        x = torch.randn(7, ours.in_features, generator=generator) ** 3
        theirs = linear(x, comfy_weight(tensors, name, described[name]), tensors[f"{name}.bias"])
        magnitudes = ours.quantized_input(x).abs() @ ours.dequantized_weight().abs().T + 1
        assert ((ours(x) - theirs).abs() <= 1e-6 * magnitudes).all(), target


@pytest.mark.parametrize("expert", EXPERTS)
def test_diffusers_own_converter_maps_every_name_back(source, exported, expert):
    file = exported / f"wan_{expert}.safetensors"
    tensors, described = load_file(file), layers(file)
    for name, conf in described.items():
        tensors[f"{name}.weight"] = comfy_weight(tensors, name, conf).dequantize()
        for leaf in ("s_rel", "s_channel", "codebook"):
            del tensors[f"{name}.weight_{leaf}"]
    converted = convert_wan_transformer_to_diffusers(tensors)
    original = WanTransformer3DModel.from_pretrained(source / EXPERTS[expert]).state_dict()
    assert {name: t.shape for name, t in converted.items()} == {name: t.shape for name, t in original.items()}
    for name, tensor in original.items():
        if name.removesuffix(".weight") in TARGETS:  # rounded to nearest of 16 levels: 8 % of its norm
            assert (converted[name] - tensor.float()).norm() < 0.1 * tensor.float().norm()
        else:
            assert torch.equal(converted[name].float(), tensor.float()), name


def test_what_the_workflow_has_to_set_is_written_down(exported):
    record = json.loads((exported / "export.json").read_text())
    assert record["workflow"] == {"shift": 5.0, "boundary": 0.9} and record["target"] == "comfyui_w4a8"
    assert {name: entry["linears"] for name, entry in record["files"].items()} == {
        f"wan_{expert}.safetensors": 10 * BLOCKS for expert in EXPERTS
    }


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, exported, tmp_path):
    again = tmp_path / "wan"
    export_comfyui(checkpoint, again, plan_export(checkpoint, again))
    assert (again / "export.json").read_bytes() == (exported / "export.json").read_bytes()  # holds SHA-256 of the files


def test_a_fixed_checkpoint_gives_the_bytes_it_always_gave(source, tmp_path):
    """All numbers from integers. A change of these digests is a change of the contract."""
    plain = tmp_path / "source"
    shutil.copytree(source, plain)
    for subfolder in EXPERTS.values():
        file = plain / subfolder / "diffusion_pytorch_model.safetensors"
        ramps = {name: ramp(t.shape) for name, t in sorted(load_file(file).items())}
        save_file(ramps, file, metadata={"format": "pt"})

    def packed(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        weights = open_weights(folder)
        for index in range(BLOCKS):
            mine = [target for target in TARGETS if target.startswith(f"blocks.{index}.")]
            yield index, {target: fixed_linear(*weights.shape(f"{target}.weight")) for target in mine}

    experts = {name: (SETTINGS, packed(plain / name)) for name in EXPERTS.values()}
    write_checkpoint(plain, tmp_path / "full", experts, dtype=torch.bfloat16, flow_shift=5.0)
    out = tmp_path / "wan"
    export_comfyui(tmp_path / "full", out, plan_export(tmp_path / "full", out))
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("*.safetensors")}
    assert digests == dict.fromkeys(("wan_high_noise.safetensors", "wan_low_noise.safetensors"), GOLDEN)


def ramp(shape: Sequence[int]) -> Tensor:
    """-16 to 15, over and over, in halves."""
    return ((torch.arange(math.prod(shape)) % 64 - 32) / 2).view(*shape).bfloat16()


def fixed_linear(N: int, K: int) -> PackedLinear:
    codes = (torch.arange(N * K) * 7 // 3 % 16).view(N, K).to(torch.uint8)
    group = (torch.arange(N * K // 16) % 100 + 1.0).view(N, K // 16).to(torch.float8_e4m3fn)
    scales = Scales(group, None, (torch.arange(N) % 32 + 1) / 1024)
    return pack_linear(codes, scales, torch.ones(K, dtype=torch.bfloat16), clip_ratio=torch.ones(1))


def test_command(checkpoint, exported, tmp_path):
    def run(*arguments: str):
        return CliRunner().invoke(cli.app, ["export", str(checkpoint), *arguments])

    out = tmp_path / "wan"
    dry = run(str(out), "--to", "comfyui", "--dry-run")
    assert dry.exit_code == 0 and not out.exists()
    assert "wan_high_noise.safetensors: 20 quantized linears, 0.002 GB" in dry.stdout
    assert run(str(out), "--to", "comfyui").exit_code == 0
    for name in ("export.json", "wan_low_noise.safetensors"):
        assert (out / name).read_bytes() == (exported / name).read_bytes()
    assert run(str(out), "--to", "comfyui").exit_code == 2
    assert run(str(out), "--to", "gguf").exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_format": "int4"}, "its formats are int4 with int8_row"),
        ({"activation_format": None}, "its formats are asym_w4a8 with None"),
        ({"hadamard": "sylvester"}, "its rotations are of the kind sylvester"),
        ({"rotations": {}}, "blocks.0.attn1.to_q is rotated in groups of 0 channels"),
        ({"rotations": dict.fromkeys(TARGETS, 64)}, "rotated in groups of 64 channels"),
        ({"rank": 8}, "low-rank branch of rank 8"),
        ({"mean_subtraction": True}, "it subtracts means"),
    ],
)
def test_settings_that_the_file_cannot_carry_are_refused(checkpoint, tmp_path, changes, message):
    folder = tmp_path / "changed"
    for file in checkpoint.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(checkpoint)).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(checkpoint)).hardlink_to(file)
    config = folder / "transformer_2/config.json"
    content = json.loads(config.read_text())
    content["quantization_config"] = replace(SETTINGS, **changes).to_config()
    config.unlink()
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"transformer_2: .*{message}.*comfyui_w4a8"):
        plan_export(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [("smooth_factor", torch.full((WIDTH,), 2.0, dtype=torch.bfloat16)), ("clip_ratio", torch.tensor([0.9]))],
)
def test_a_smoothing_or_a_clip_is_refused(source, tmp_path, name, value):
    only = tuple(target for target in TARGETS if "ffn.net.2" not in target)  # the others have WIDTH channels
    settings = replace(SETTINGS, targets=only, rotations=dict.fromkeys(only, 256))
    folder = pack(source, tmp_path / "changed", settings, **{name: value})
    with pytest.raises(UserError, match=f"attn1.to_q.{name} is not 1 everywhere"):
        plan_export(folder, tmp_path / "out")


def test_an_unquantized_pipeline_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="no quantization_config"):
        plan_export(source, tmp_path / "out")


def test_an_export_is_no_source_for_another_quantization(source, exported, tmp_path):
    files = {expert: exported / f"wan_{expert}.safetensors" for expert in EXPERTS}
    with pytest.raises(UserError, match="this is a quantized file; use the bf16 or fp16 file"):
        import_files(source, files, tmp_path / "out")
