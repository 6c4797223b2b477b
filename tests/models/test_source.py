import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.errors import UserError
from stepquant.models.manifest import read_manifest, write_manifest
from stepquant.models.source import describe_source, resolve_source
from tests.wan import BLOCKS, SITES, save_expert

INDEX = {
    "_class_name": "WanImageToVideoPipeline",
    "boundary_ratio": 0.9,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A pipeline folder with all that a description reads; the VAE's one tensor stands for its weights."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 1000}))
    save_expert(folder / "transformer", torch.bfloat16, seed=1)
    save_expert(folder / "transformer_2", torch.bfloat16, seed=2)
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text("{}")
    save_file({"weight": torch.zeros(64)}, folder / "vae/diffusion_pytorch_model.safetensors")
    (folder / "README.md").write_text("not a component")
    return folder


@pytest.fixture
def source(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "source")


def describe(folder):
    return describe_source(folder, str(folder), None)


def refusal(folder):
    with pytest.raises(UserError) as caught:
        describe(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_two_expert_model(finished):
    manifest = describe(finished)
    found = manifest.source, manifest.revision, manifest.pipeline, manifest.num_train_timesteps
    assert found == (str(finished), None, "WanImageToVideoPipeline", 1000)
    assert list(manifest.experts) == ["high_noise", "low_noise"]
    high, low = manifest.experts.values()
    assert (high.subfolder, high.t_range, high.blocks) == ("transformer", (900, 1000), BLOCKS)
    assert (low.subfolder, low.t_range, low.blocks) == ("transformer_2", (0, 900), BLOCKS)
    stored = load_file(finished / "transformer/diffusion_pytorch_model.safetensors")
    assert high.bf16_bytes == 2 * sum(tensor.numel() for tensor in stored.values())


def test_shapes_are_rows_and_columns_of_each_linear(finished):
    sites = describe(finished).expert("high_noise").sites
    assert list(sites) == ["attn1.qkv", "attn1.out", "attn2.q", "attn2.kv", "attn2.out", "ffn.up", "ffn.down"]
    qkv, kv = sites["attn1.qkv"], sites["attn2.kv"]
    assert (qkv.depends_on_timestep, qkv.linears) == (True, {f"attn1.to_{x}": (64, 64) for x in "qkv"})
    assert (kv.depends_on_timestep, kv.linears) == (False, {"attn2.to_k": (64, 64), "attn2.to_v": (64, 64)})
    assert (qkv.rows, qkv.columns) == (192, 64)
    assert sites["ffn.up"].linears == {"ffn.net.0.proj": (128, 64)}
    assert sites["ffn.down"].linears == {"ffn.net.2": (64, 128)}


def test_the_files_of_every_component_are_hashed(finished):
    files = describe(finished).files
    expected = {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    expected |= {
        f"{expert}/{name}"
        for expert in ("transformer", "transformer_2")
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    assert set(files) == expected
    for name, digest in files.items():
        assert digest == hashlib.sha256((finished / name).read_bytes()).hexdigest()


def test_folders_that_are_no_components_are_not_hashed(source):
    before = describe(source).files
    for name in ("assets/clip.mp4", "image_encoder/config.json", ".cache/lock"):
        (source / name).parent.mkdir()
        (source / name).write_text("{}")
    assert describe(source).files == before


def test_a_component_behind_a_link_is_hashed(source, tmp_path):
    before = describe(source)
    (source / "transformer").rename(tmp_path / "elsewhere")
    (source / "transformer").symlink_to(tmp_path / "elsewhere")
    assert describe(source) == before
    save_expert(tmp_path / "elsewhere", torch.bfloat16, seed=5)
    assert describe(source).expert_digest("high_noise") != before.expert_digest("high_noise")


def test_the_digest_of_an_expert_depends_on_its_own_files_only(source):
    before = describe(source)
    (source / "transformer_2/config.json").write_text((source / "transformer_2/config.json").read_text() + " ")
    after = describe(source)
    assert after.expert_digest("high_noise") == before.expert_digest("high_noise")
    assert after.expert_digest("low_noise") != before.expert_digest("low_noise")
    assert before.expert_digest("high_noise") != before.expert_digest("low_noise")


def test_a_dense_model_has_one_expert_over_all_of_t(source):
    (source / "model_index.json").write_text(
        json.dumps(INDEX | {"boundary_ratio": None, "transformer_2": [None, None]})
    )
    shutil.rmtree(source / "transformer_2")
    experts = describe(source).experts
    assert list(experts) == ["denoiser"]
    assert (experts["denoiser"].subfolder, experts["denoiser"].t_range) == ("transformer", (0, 1000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "WanVACEPipeline"}, "_class_name 'WanVACEPipeline' is not supported; allowed: WanImage"),
        ({"_class_name": ["own", "WanPipeline"]}, "_class_name ['own', 'WanPipeline'] is not supported"),
        ({"boundary_ratio": None}, "a transformer_2 but no boundary_ratio, with which the pipeline would never call"),
        ({"transformer_2": [None, None]}, "boundary_ratio 0.9 but no transformer_2"),
        ({"_class_name": "WanPipeline"}, None),  # what it is refused for is in the denoiser's config
    ],
)
def test_a_pipeline_that_would_not_run_as_it_is_described(source, changes, message):
    (source / "model_index.json").write_text(json.dumps(INDEX | changes))
    expected = f"{source}/model_index.json: {message}"
    if message is None:
        expected = f"{source}/transformer config: in_channels 36 with out_channels 16; WanPipeline passes 16 channels"
    assert refusal(source).startswith(expected)


def test_another_denoiser_class_than_the_index_says(source):
    config = source / "transformer_2/config.json"
    config.write_text(config.read_text().replace("WanTransformer3DModel", "SkyReelsV2Transformer3DModel"))
    assert refusal(source).startswith(
        f"{source / 'transformer_2'}/config.json: _class_name 'SkyReelsV2Transformer3DModel' is not supported"
    )


def test_the_order_of_experts_sites_and_linears_survives_the_file(finished, tmp_path):
    """Every stage reads it from there; sorted keys would stack to_k before to_q and round another matrix."""
    manifest = describe(finished)
    write_manifest(tmp_path / "manifest.json", manifest)
    found = read_manifest(tmp_path / "manifest.json")
    assert found == manifest and list(found.experts) == ["high_noise", "low_noise"]
    for described in found.experts.values():
        assert described.ordered_sites == SITES


def test_compression_of_the_vae(source):
    """From its config.json; without it, or without the factors in it, those of the Wan VAE."""
    assert describe(source).compression.model_dump() == {"scale_factor_spatial": 8, "scale_factor_temporal": 4}
    (source / "vae/config.json").write_text(json.dumps({"scale_factor_spatial": 16}))
    assert describe(source).compression.model_dump() == {"scale_factor_spatial": 16, "scale_factor_temporal": 4}


@pytest.mark.parametrize("component", ["transformer", "transformer_2", "vae", "scheduler"])
def test_a_missing_component(source, component):
    shutil.rmtree(source / component)
    assert (
        refusal(source)
        == f"{source / component}: no such folder, but {source / 'model_index.json'} names this component"
    )


@pytest.mark.parametrize("component", ["transformer_2", "vae"])
def test_weights_that_are_missing_truncated_or_pickled(source, component):
    file = source / component / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    assert refusal(source).startswith(
        f"{file}: truncated or damaged: {len(whole) - 7} bytes, its header says {len(whole)}"
    )
    file.unlink()
    assert refusal(source).startswith(f"{file.parent}: no weights; expected ")
    torch.save({}, file.with_suffix(".bin"))
    assert "found only pickled weights (diffusion_pytorch_model.bin)" in refusal(source)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("model_index.json", "_class_name"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
        ("transformer/config.json", "in_channels"),
    ],
)
def test_a_config_that_is_missing_broken_or_empty(source, file, key):
    path = source / file
    path.write_text("{}")
    assert refusal(source) == f"{path}: no '{key}' in it; expected that of a diffusers pipeline"
    path.write_text("{")
    assert refusal(source).startswith(f"{path}: not JSON (")
    path.unlink()
    assert refusal(source) == f"{path}: no such file; expected that of a diffusers pipeline"


def test_a_local_folder_is_found(finished):
    assert resolve_source(str(finished), None) == finished


@pytest.mark.parametrize("source", ["no-such-folder", "a/b/c", "/absent/folder"])
def test_neither_a_folder_nor_a_hub_id(source):
    with pytest.raises(UserError) as caught:
        resolve_source(source, None)
    assert (
        str(caught.value) == f"model.source: {source} has no model_index.json; "
        "expected a diffusers folder, or a hub id such as owner/name"
    )


def test_a_folder_without_an_index_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    with pytest.raises(UserError, match="model.source: owner/name has no model_index.json"):
        resolve_source("owner/name", None)


def test_a_hub_id_without_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="model.source: no folder nobody/no-such-model, and the hub gave no such model: "
    ):
        resolve_source("nobody/no-such-model", None)
