import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmarks.make_shape import Shape
from stepquant.errors import UserError
from stepquant.plan.find_model import find_model
from stepquant.plan.printing import make_workload
from stepquant.plan.workload import rows_kept, search_rows, summed_tokens, timesteps
from stepquant.profiles import read_profiles

A14B = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"


def test_the_known_model_has_the_parameters_of_its_class(real):
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(Shape(blocks=40).config())
    linears = sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if name.startswith("blocks.") and isinstance(m, torch.nn.Linear)
    )
    for expert in real.experts:
        assert expert.bf16_bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
        assert expert.weights == linears == 40 * (8 * 5120**2 + 2 * 5120 * 13824)


def test_calls_of_the_known_model(real):
    """40 steps at shift 5 put 15 above t = 900; 21 x 30 x 52 patches; with guidance each step is two calls."""
    high, low = real.experts
    assert real.tokens == 21 * 30 * 52 == 32760
    assert (high.steps, low.steps) == ((5, 5, 5), (5, 13, 7))
    assert real.prompts == {
        "calibration": 8,
        "validation": 2,
        "heldout": 4,
        "evaluation": 16,
    }  # nothing to count: as assumed
    assert high.all_calls == 14 * 2 * 15 and low.calls("calibration", 1) == 8 * 2 * 13
    fewer = replace(low, steps_per_bin=6)
    assert fewer.all_calls == 14 * 2 * (5 + 6 + 6) and fewer.calls("calibration", 1) == 8 * 2 * 6


def test_timesteps_are_those_that_a_pipeline_steps_through():
    """UniPC at shift 5: t = 1000 * 5 s / (1 + 4 s) at s = 1, 0.75025, 0.5005, 0.25075."""
    assert timesteps(4, 5.0) == pytest.approx(
        [1000.0, 1000 * 3.75125 / 4.001, 1000 * 2.5025 / 3.002, 1000 * 1.25375 / 2.003]
    )


def test_prompts_are_counted_in_the_manifest_that_the_params_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = tmp_path / "data/calibration/manifest.jsonl"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(
        "\n".join(json.dumps({"split": split}) for split in ("calibration", "calibration", "validation", "heldout"))
        + "\n"
    )
    (tmp_path / "params.yaml").write_text(
        read_profiles()["wan2.2-i2v-a14b"].replace("steps_per_bin: 2", "steps_per_bin: null")
    )
    assert make_workload(tmp_path / "params.yaml").prompts == {
        "calibration": 2,
        "validation": 1,
        "heldout": 1,
        "evaluation": 16,
    }


def test_samples_are_never_more_than_there_is(tmp_path, monkeypatch):
    """10,000 tokens of each split and bin; the 512 text tokens of 8, 2 and 4 prompts, with and without guidance, are
    fewer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(read_profiles()["wan2.2-i2v-a14b"].replace("_tokens: 512", "_tokens: 10000"))
    run = make_workload(tmp_path / "params.yaml")
    high, _ = run.experts
    sites = {site.name: site for site in high.sites}
    assert (
        rows_kept(run, high, sites["ffn.down"]) == 3 * 3 * 10000
        and search_rows(run, high, sites["ffn.down"]) == 3 * 10000
    )
    assert (
        rows_kept(run, high, sites["attn2.kv"]) == 8192 + 2048 + 4096
        and search_rows(run, high, sites["attn2.kv"]) == 8192
    )


def test_hessians_take_every_fourth_token_but_all_of_the_text(real):
    """15 steps, two branches, 8 prompts; every step of a prompt has the same text."""
    high, _ = real.experts
    sites = {site.name: site for site in high.sites}
    assert summed_tokens(real, high, sites["ffn.down"]) == 240 * 32760 / 4
    assert summed_tokens(real, high, sites["attn2.kv"]) == 16 * 512


def test_a_local_model_is_described_without_its_weights_being_hashed(made):
    manifest, other = find_model(str(made / "model"), None, made / "absent.json")
    assert manifest.expert("denoiser").blocks == 2 and not manifest.files
    components = ("scheduler", "text_encoder", "tokenizer", "vae")
    assert other == sum(file.stat().st_size for name in components for file in (made / "model" / name).iterdir())


def test_a_model_that_was_described_once_need_not_be_here(tmp_path, made):
    recorded = tmp_path / "manifest.json"
    recorded.write_text(
        json.dumps(json.loads((made / "artifacts/model/manifest.json").read_text()) | {"source": "some/model"})
    )
    assert find_model("some/model", None, recorded)[0].expert("denoiser").blocks == 2
    with pytest.raises(UserError, match="other/model is neither a local folder nor known here; run `stepquant model`"):
        find_model("other/model", None, recorded)
