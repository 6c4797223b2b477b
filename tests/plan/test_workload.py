import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmarks.make_shape import Shape
from stepquant.errors import UserError
from stepquant.plan import find_model as find
from stepquant.plan.find_model import find_model
from stepquant.plan.printing import make_workload
from stepquant.plan.workload import rows_kept, search_rows, summed_tokens
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


def test_timesteps_are_those_that_the_scheduler_steps_through(real):
    """UniPC at shift 5: t = 1000 * 5 s / (1 + 4 s), in whole numbers."""
    assert real.timesteps[:3] == [999.0, 994.0, 989.0] and real.timesteps[-1] == 117.0


def test_prompts_are_counted_in_the_manifest_that_the_params_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = tmp_path / "data/calibration/my_prompts.jsonl"
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
    model = find_model(str(made / "model"), None, made / "absent.json")
    assert model.manifest.expert("denoiser").blocks == 2 and not model.manifest.files and not model.download
    files = [path for path in (made / "model").glob("*/*") if path.is_file()]
    assert model.stored_bytes == sum(path.stat().st_size for path in files)
    assert model.other_stored_bytes == sum(path.stat().st_size for path in files if path.parent.name != "transformer")
    assert model.stored_itemsize("denoiser") == pytest.approx(2, rel=0.01)


def test_a_model_that_was_downloaded_is_read_there(tmp_path, made, monkeypatch):
    """At the commit that stage model found. Without the files there is nothing to read."""
    recorded = tmp_path / "manifest.json"
    written = json.loads((made / "artifacts/model/manifest.json").read_text())
    recorded.write_text(json.dumps(written | {"source": "some/model", "revision": "a" * 40}))
    asked = []
    monkeypatch.setattr(find, "cached_snapshot", lambda *where: asked.append(where) or made / "model")
    assert find_model("some/model", "main", recorded).manifest.expert("denoiser").blocks == 2
    assert asked == [("some/model", "a" * 40)]
    monkeypatch.setattr(find, "cached_snapshot", lambda *where: None)
    with pytest.raises(UserError, match="its files are not here; run `stepquant model`"):
        find_model("some/model", "main", recorded)
    with pytest.raises(UserError, match="other/model is neither a local folder nor known here; run `stepquant model`"):
        find_model("other/model", None, recorded)
