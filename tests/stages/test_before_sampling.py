"""What configs, headers and parameters can tell, `model` and `trajectories` refuse before a pipeline is loaded."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stages import trajectories
from tests.stages.conftest import MANIFEST, TINY_MODEL, WEIGHTS
from tests.stages.test_bad_input import edit_rows


@pytest.fixture
def unloaded(monkeypatch):
    """Loading the pipeline fails the test."""

    def load(*arguments):
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr(trajectories, "source_pipeline", load)


def configure(folder, file, **values):
    path = folder.root / TINY_MODEL / file
    content = json.loads(path.read_text()) | values
    path.unlink()  # can be a hardlink
    path.write_text(json.dumps(content))


def retensor(folder, change):
    file = folder.root / TINY_MODEL / "transformer" / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)


BOTH = pytest.mark.parametrize("stage", ["model", "trajectories"])


# The sampler of the folder has t = 999 for the high-noise expert, 888 and 666 for the other.
@BOTH
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sampling.num_frames", 1, "sampling.num_frames: 1; this model makes 1 + a multiple of 4 frames, at least 5"),
        ("sampling.height", 37, "sampling.height: 37; this model needs a multiple of 8: use 32 or 40"),
        ("sampling.steps", 1, "sampling.steps: no step reaches the expert low_noise"),
        ("sampling.max_sequence_length", 64, "sampling.max_sequence_length: 64; allowed: at most 32"),
        ("sampling.guidance_scale_2", 3.0, "sampling.guidance_scale_2: 3 has no effect"),
        ("bins.high_noise", [1000, 950, 900], "bins.high_noise: bin 1 (900, 950] has no step; with 3 steps"),
        ("bins", {"denoiser": 1}, "bins: has denoiser; this model has the experts high_noise and low_noise"),
    ],
)
def test_parameters_that_do_not_fit_the_model(folder, refused, unloaded, stage, key, value, message):
    folder.set(key, value)
    shutil.rmtree(folder.root / ".units/trajectories")
    assert refused(stage).startswith(message)


def test_experts_of_another_model(folder, refused):
    experts = {"denoiser": {name: {} for name in ("smooth", "center", "rotate", "lowrank", "gptq", "clip")}}
    folder.set("experts", experts)
    assert refused("model").startswith("experts: has denoiser; this model has the experts high_noise and low_noise")


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "scheduler/scheduler_config.json",
            {"use_flow_sigmas": False},
            "scheduler: sampling.flow_shift does not act on",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "scheduler: sampling.flow_shift does not"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "scheduler: use_dynamic_shifting: true"),
        ("model_index.json", {"boundary_ratio": None}, f"{TINY_MODEL}/model_index.json: a transformer_2 but no bound"),
        ("model_index.json", {"vae": [None, None]}, f"{TINY_MODEL}/model_index.json: vae is null or missing"),
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, f"{TINY_MODEL}/model_index.json: _class_name 'WanVA"),
        ("transformer/config.json", {"num_layers": 1}, f"{TINY_MODEL}/transformer: the weights have 2 of 'blocks', "),
        (
            "text_encoder/config.json",
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            f"{TINY_MODEL}/text_encoder/config.json: quantization_config: quantized already (bitsandbytes)",
        ),
    ],
)
def test_models_that_cannot_be_calibrated(folder, refused, file, values, message):
    configure(folder, file, **values)
    assert refused("model").startswith(message)


def test_scaled_fp8_and_an_extra_key(folder, refused):
    key = "blocks.0.attn1.to_q.scale_weight"
    retensor(folder, lambda tensors: tensors.update({key: torch.ones(1)}))
    assert refused("model").startswith(f"{TINY_MODEL}/transformer: tensor '{key}': these weights are scaled")
    retensor(folder, lambda tensors: tensors.update({"extra": tensors.pop(key)}))
    assert refused("model").startswith(f"{TINY_MODEL}/transformer: unknown tensor 'extra'")


def test_pictures_that_are_far_smaller_than_the_video(folder, refused, unloaded):
    shutil.rmtree(folder.root / ".units/trajectories")
    Image.new("RGB", (15, 15)).save(folder.root / MANIFEST.replace("manifest.jsonl", "images/small.png"))
    edit_rows(folder, lambda rows: [row | {"image": "images/small.png"} for row in rows])
    small = "the picture of prompt calibration_00 has 15 x 15 pixels, for videos of 32 x 32"
    assert refused("trajectories").startswith(f"trajectories.manifest: {small}")
    assert "generate.manifest: the picture of prompt" in refused("generate", "--variant", "bf16")


def test_links_to_components_are_followed(folder):
    before = (folder.root / "artifacts/model/manifest.json").read_text()
    model = folder.root / TINY_MODEL
    for name in ("transformer", "vae"):
        (model / name).rename(folder.root / name)
        (model / name).symlink_to(folder.root / name)
    result = folder.run("model")
    assert result.exit_code == 0, result.output
    assert (folder.root / "artifacts/model/manifest.json").read_text() == before
    # DVC does not look behind a link to a folder
    assert f"warning: DVC does not watch {TINY_MODEL}/transformer, which lies outside data/models" in result.stderr


def test_check_and_doctor_say_the_same(folder, monkeypatch):
    from typer.testing import CliRunner

    from stepquant import cli

    for section, place in (("trajectories", "data/calibration"), ("generate", "data/evaluation")):
        shutil.copytree("data/prompts", place)  # where DVC watches prompts
        folder.set(f"{section}.manifest", f"{place}/manifest.jsonl")
    assert CliRunner().invoke(cli.app, ["check"]).stdout == "params.yaml: fine\n"
    message = "sampling.height: 37; this model needs a multiple of 8: use 32 or 40"
    folder.set("sampling.height", 37)
    folder.set("compute.device", "abacus")
    checked = CliRunner().invoke(cli.app, ["check"])
    assert (checked.exit_code, checked.stderr) == (2, f"error: {message}\n")
    examined = CliRunner().invoke(cli.app, ["doctor"])
    assert examined.exit_code == 1 and message in examined.stdout.splitlines()
    assert "compute.device: 'abacus' cannot be used here" in examined.stdout  # and the model was looked at all the same
    planned = CliRunner().invoke(cli.app, ["plan", "--machine", "h100"])
    assert (planned.exit_code, planned.stderr) == (2, f"error: {message}\n")
