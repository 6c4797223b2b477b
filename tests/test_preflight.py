"""Parameters, model and prompts, looked at together."""

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from stepquant.errors import UserError
from stepquant.params import Lora
from stepquant.preflight import DOWNLOADS, is_here, look_at_model, look_at_prompts, unwatched
from stepquant.profiles import read_profiles

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def params(tmp_path, monkeypatch):
    """Writes the demo's params with some texts replaced, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        text = read_profiles()["demo"]
        for old, new in changes.values():
            assert old in text
            text = text.replace(old, new, 1)
        Path("params.yaml").write_text(text)
        return Path("params.yaml")

    return write


def test_a_hub_model_is_not_downloaded(params, monkeypatch):
    asked = []

    def snapshot_download(name, *, local_files_only=False, **options):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    file = params(source=("source: data/models/wan22-mini", "source: owner/name"))
    assert look_at_model(file) == f"model.source: owner/name {DOWNLOADS}" and not is_here(file)
    assert asked and all(asked)


def test_a_folder_that_is_not_there(params):
    file = params()
    assert not is_here(file)
    with pytest.raises(UserError, match="model.source: data/models/wan22-mini has no model_index.json"):
        look_at_model(file)


def test_a_lora_that_is_not_there_is_missed_before_the_model_is_downloaded(params):
    lora = "loras: [{expert: high_noise, file: data/models/absent.safetensors, weight: 1.0}]"
    file = params(source=("data/models/wan22-mini", "owner/name"), loras=("loras: []", lora))
    with pytest.raises(
        UserError, match="model.loras.0.file: no such file data/models/absent.safetensors; put the LoRA"
    ):
        look_at_model(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"r": ("hadamard_sizes: [0, 64]", "hadamard_sizes: [512]")},
            "rotate.hadamard_sizes, high_noise .* size 512 for",
        ),
        ({"r": ("rank: 32", "rank: 300")}, "lowrank.rank: 300 for high_noise"),
        (
            {
                "r": (
                    "low_noise: {smooth: {}, center: {}, rotate: {}",
                    "low_noise: {smooth: {}, center: {}, rotate: {hadamard_sizes: [512]}",
                )
            },
            "low_noise",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_widths_is_refused_before_anything_is_sampled(params, changes, message):
    (Path.cwd() / "data").symlink_to(ROOT / "data")
    assert look_at_model(params()).startswith("model.source: ")
    with pytest.raises(UserError, match=message):
        look_at_model(params(**changes))


def test_prompts_that_are_not_here_are_left_to_the_stages(params):
    here = "is not here"
    assert look_at_prompts(params()) == (
        f"trajectories.manifest: data/calibration/manifest.jsonl {here}, generate.manifest: "
        f"data/evaluation/manifest.jsonl {here}, trajectories.text_prompts: data/calibration/captions.txt {here}"
    )


def test_the_demo_s_prompts_with_the_size_of_the_real_model(params):
    (Path.cwd() / "data").symlink_to(ROOT / "data")
    assert look_at_prompts(params()).endswith("generate.manifest: 8 prompts, trajectories.text_prompts: 128 captions")
    file = params(height=("height: 64", "height: 480"), width=("width: 64", "width: 832"))
    with pytest.raises(UserError, match="trajectories.manifest: the picture of prompt calibration_00 has 64 x 64 pix"):
        look_at_prompts(file)


def test_what_dvc_watches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside, outside = Path("data/models/mine"), Path("elsewhere/mine")
    for folder in (inside, outside):
        (folder / "vae").mkdir(parents=True)
    assert unwatched(inside, []) == ""
    (Path("data/models/linked")).symlink_to(outside.resolve())
    lora = Lora(expert="denoiser", file="data/models/linked/lora.safetensors", weight=1.0)
    assert unwatched(inside, [lora]).startswith("DVC does not watch data/models/linked, which lies outside data/models")
    assert unwatched(outside, []).startswith("DVC does not watch elsewhere/mine, which lies outside data/models; ")
    (inside / "transformer").symlink_to(outside.resolve() / "vae")
    assert unwatched(inside, []).startswith("DVC does not watch data/models/mine/transformer, which lies outside ")
