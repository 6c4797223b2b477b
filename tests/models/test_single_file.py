"""Importing single files: every tensor of a diffusers model comes back from Wan-Video's names, whatever the family."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.tiny_pipelines import TINY_PIPELINES, save_pipeline
from stepquant.cli import app
from stepquant.errors import UserError
from stepquant.models.single_file import import_files
from stepquant.models.source import describe_source
from stepquant.models.weights import open_weights
from tests.native_wan import native_name

WEIGHTS = "diffusion_pytorch_model.safetensors"
EXPERTS = {"transformer": "high_noise", "transformer_2": "low_noise"}


def export(base, out, prefix="", change=lambda key, tensor: tensor):
    """Each expert of a pipeline folder in a single file with Wan-Video's names; what it holds by diffusers' names."""
    found = sorted(base.glob("transformer*"))
    files, tensors = {}, {}
    for folder in found:
        name = EXPERTS[folder.name] if len(found) > 1 else "denoiser"
        stored = {key: change(key, tensor) for key, tensor in load_file(folder / WEIGHTS).items()}
        files[name], tensors[folder.name] = out / f"{name}.safetensors", stored
        save_file({prefix + native_name(key): tensor for key, tensor in stored.items()}, files[name])
    return files, tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("base") / "base", TINY_PIPELINES["Wan2.2-I2V-A14B"])


@pytest.fixture
def single(base, tmp_path):
    """Files of the two-expert model that a test may damage, and how they are imported."""
    files, _ = export(base, tmp_path)

    def damage(change, expert="high_noise"):
        tensors = load_file(files[expert])
        change(tensors)
        save_file(tensors, files[expert])

    return SimpleNamespace(files=files, damage=damage, run=lambda: import_files(base, files, tmp_path / "out"))


@pytest.mark.parametrize("model", TINY_PIPELINES)
def test_the_tensors_of_every_family_come_back_to_the_bit(tmp_path, model):
    base = save_pipeline(tmp_path / "base", TINY_PIPELINES[model])
    files, tensors = export(base, tmp_path)
    import_files(base, files, tmp_path / "out", shard_bytes=50_000)
    for folder, expected in tensors.items():
        weights = open_weights(tmp_path / "out" / folder)
        assert set(weights) == set(expected)
        assert all(torch.equal(weights.get(key), tensor) for key, tensor in expected.items())
    imported = describe_source(tmp_path / "out", "model", None)
    original = describe_source(base, "model", None)
    assert imported.model_copy(update={"files": {}}) == original.model_copy(update={"files": {}})
    others = {name for name in original.files if not name.startswith("transformer") or name.endswith("config.json")}
    assert others and all(imported.files[name] == original.files[name] for name in others)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_prefixes_and_stored_dtypes(base, tmp_path, prefix, stored):
    """As ComfyUI's files: matrices in one dtype, norms and biases in float32."""
    files, tensors = export(base, tmp_path, prefix, lambda key, t: t.to(stored) if t.ndim > 1 else t)
    import_files(base, files, tmp_path / "out")
    weights = open_weights(tmp_path / "out" / "transformer_2")
    for key, tensor in tensors["transformer_2"].items():
        assert weights.dtype(key) == tensor.dtype
        assert torch.equal(weights.get(key).view(torch.uint8), tensor.view(torch.uint8))


def test_shards_are_bounded_and_loaded_by_diffusers(base, tmp_path):
    from diffusers import WanTransformer3DModel

    files, tensors = export(base, tmp_path)
    import_files(base, files, tmp_path / "out", shard_bytes=60_000)
    shards = sorted((tmp_path / "out/transformer").glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    largest = max(tensor.nbytes for tensor in tensors["transformer"].values())
    assert len(shards) > 3 and max(sizes) <= max(60_000, largest)
    state = WanTransformer3DModel.from_pretrained(tmp_path / "out/transformer").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors["transformer"].items())


def test_a_base_without_the_weights_of_its_experts_is_enough(base, tmp_path):
    files, tensors = export(base, tmp_path)
    light = shutil.copytree(base, tmp_path / "light", ignore=lambda at, names: {WEIGHTS} if "transformer" in at else ())
    import_files(light, files, tmp_path / "out")
    assert set(open_weights(tmp_path / "out/transformer")) == set(tensors["transformer"])


def test_names_of_diffusers_are_read_as_well(base, tmp_path):
    files = {name: base / folder / WEIGHTS for folder, name in EXPERTS.items()}
    import_files(base, files, tmp_path / "out")
    assert set(open_weights(tmp_path / "out/transformer")) == set(load_file(base / "transformer" / WEIGHTS))


Q = "blocks.0.self_attn.q.weight"
ONE = torch.ones(1)
REFUSED = [
    (lambda t: t.update({"blocks.0.self_attn.q.scale_weight": ONE}), "scale_weight: this is scaled fp8, whose weights"),
    (lambda t: t.update({"scaled_fp8": ONE}), "scaled_fp8: this is scaled fp8"),
    (lambda t: t.update({"blocks.0.self_attn.q.weight_scale": ONE}), "weight_scale: this is a quantized file"),
    (lambda t: t.update({"blocks.0.self_attn.q.lora_down.weight": ONE}), "lora_down.weight: this is a LoRA; name"),
    (lambda t: t.update({"blocks.0.norm3.diff": ONE}), "norm3.diff: this is a LoRA"),
    (lambda t: t.update({"vace_blocks.0.after_proj.bias": ONE}), "after_proj.bias is no tensor of the model in"),
    (lambda t: t.update({"blocks.2.ffn.0.bias": torch.ones(128)}), "blocks.2.ffn.0.bias is no tensor of the model in"),
    (lambda t: t.update({"img_emb.proj.1.bias": ONE}), "img_emb.proj.1.bias is no tensor of the model in"),
    (lambda t: t.pop(Q), "lacks blocks.0.attn1.to_q.weight .diffusers' name."),
    (lambda t: [t.pop(key) for key in list(t) if key.startswith("blocks.1.")], "lacks blocks.1.attn1.norm_k.weight"),
    (lambda t: t.update({Q: torch.ones(32, 32)}), r"q.weight has shape \[32, 32\]; the model in .* has \[64, 64\]"),
    (lambda t: t.update({Q: t[Q].char()}), "q.weight has dtype torch.int8; allowed: torch.bfloat16"),
    (lambda t: t.update({f"diffusion_model.{Q}": t[Q].clone()}), "q.weight is the same tensor as"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_file_that_does_not_fit(single, tmp_path, change, message):
    single.damage(change)
    with pytest.raises(UserError, match=message) as caught:
        single.run()
    assert str(caught.value).startswith(f"{single.files['high_noise']}: ") and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.gguf", b"GGUF\3\0\0\0", "model.gguf: a GGUF file, which is quantized already"),
        ("model.safetensors", b"GGUF\3\0\0\0", "model.safetensors: a GGUF file"),
        ("model.pth", b"PK\3\4", "model.pth: a pickled file, which can run code"),
        ("model.safetensors", b"PK\3\4", "model.safetensors: a pickled file"),
        ("model.safetensors", b"{}", "not a safetensors file, or a truncated one"),
        ("absent.safetensors", None, "absent.safetensors: no such file"),
    ],
)
def test_other_formats(single, tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    single.files["low_noise"] = file
    with pytest.raises(UserError, match=message):
        single.run()


def test_exchanged_files_are_refused(single):
    """Each is nearer to the other expert, also when it is a finetune in fp8."""
    generator = torch.Generator().manual_seed(0)

    def finetune(tensors):
        tensors[Q.replace("0", "1")] += 0.01 * torch.randn(64, 64, generator=generator)

    single.damage(finetune)
    single.files |= {"high_noise": single.files["low_noise"], "low_noise": single.files["high_noise"]}
    with pytest.raises(
        UserError, match="given as high_noise, but its .* is nearer to that of low_noise in .*; exchange"
    ):
        single.run()
    single.files["low_noise"] = single.files["high_noise"]
    with pytest.raises(UserError, match="given for both experts; expected a file for each"):
        single.run()


@pytest.mark.parametrize(
    ("given", "model", "message"),
    [
        (
            ("high_noise",),
            "Wan2.2-I2V-A14B",
            "high_noise and low_noise; expected --high-noise FILE and --low-noise FILE",
        ),
        (("denoiser",), "Wan2.2-I2V-A14B", "this model has high_noise and low_noise; expected"),
        (
            ("high_noise", "low_noise"),
            "Wan2.1-T2V",
            "this model has denoiser; expected --denoiser FILE, and nothing else",
        ),
    ],
)
def test_files_of_other_experts_than_the_base_has(single, tmp_path, given, model, message):
    other = save_pipeline(tmp_path / "other", TINY_PIPELINES[model])
    with pytest.raises(UserError, match=message):
        import_files(other, {name: single.files.get(name, tmp_path / "x") for name in given}, tmp_path / "out")


def test_a_base_that_is_none(single, base, tmp_path):
    with pytest.raises(UserError, match="model_index.json: no such file"):
        import_files(tmp_path, single.files, tmp_path / "out")
    quantized = shutil.copytree(base, tmp_path / "quantized")
    config = json.loads((quantized / "transformer/config.json").read_text())
    (quantized / "transformer/config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(UserError, match="transformer: is quantized; expected the unquantized model as base"):
        import_files(quantized, single.files, tmp_path / "out")
    shutil.rmtree(quantized / "vae")
    (quantized / "transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="vae: no such folder, but .*model_index.json names this component"):
        import_files(quantized, single.files, tmp_path / "out")


def test_the_command(single, base, tmp_path):
    files = ["--high-noise", str(single.files["high_noise"]), "--low-noise", str(single.files["low_noise"])]
    command = ["import", str(tmp_path / "out"), "--base", str(base), *files]
    first = CliRunner().invoke(app, command)
    assert (first.exit_code, first.stdout) == (0, f"{tmp_path / 'out'}: written; set model.source to it\n")
    again = CliRunner().invoke(app, command)
    assert (again.exit_code, again.stderr) == (
        2,
        f"error: {tmp_path / 'out'}: exists; remove it first, or name another folder\n",
    )
