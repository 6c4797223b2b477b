"""A damaged model, a wrong manifest or a NaN in a real stage: exit code 2, one message that says what, where and what
is allowed, and nothing half-written."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.stages.conftest import HIGH, MANIFEST, TINY_MODEL, WEIGHTS

# The source model


def spoil(file, how):
    """Make weights missing, truncated or pickled; gives what the message must say."""
    whole = file.read_bytes()
    file.unlink()
    if how == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
        found = f"{len(whole) // 2} bytes, its header says {len(whole)}"
        return f"{file}: truncated or damaged: {found}; copy or download it again"
    if how == "missing":
        return f"{file.parent}: no weights; expected "
    torch.save({"x": torch.zeros(1)}, file.with_suffix(".bin"))
    return (
        f"{file.parent}: found only pickled weights ({file.stem}.bin), which can run code; convert them to safetensors"
    )


@pytest.mark.parametrize("how", ["missing", "truncated", "pickled"])
@pytest.mark.parametrize("component", ["transformer", "transformer_2", "vae", "text_encoder"])
def test_weights_that_are_missing_truncated_or_pickled(folder, refused, component, how):
    (file,) = (folder.root / TINY_MODEL / component).glob("*.safetensors")
    expected = spoil(file.relative_to(folder.root), how)
    assert refused("model").startswith(expected)


@pytest.mark.parametrize("how", ["missing", "truncated", "pickled"])
@pytest.mark.parametrize(
    ("stage", "arguments"),
    [("trajectories", ()), ("capture", HIGH), ("lowrank", HIGH), ("generate", ("--variant", "bf16"))],
)
def test_weights_that_broke_after_they_were_described(folder, refused, stage, arguments, how):
    shutil.rmtree(folder.root / ".units")
    expected = spoil((folder.root / TINY_MODEL / "transformer" / WEIGHTS).relative_to(folder.root), how)
    assert refused(stage, *arguments).startswith(expected)


def test_a_source_that_is_not_there(folder, refused):
    folder.set("model.source", "data/models/wan/mini")
    found, expected = "has no model_index.json", "a diffusers folder, or a hub id such as owner/name"
    assert refused("model") == f"model.source: data/models/wan/mini {found}; expected {expected}"


# Manifests


def edit_rows(folder, function):
    """Change the manifest's rows (a list of dicts)."""
    path = folder.root / MANIFEST
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in function(rows)))


SAMPLING_STAGES = pytest.mark.parametrize(
    ("stage", "arguments"), [("trajectories", ()), ("generate", ("--variant", "bf16"))]
)


@SAMPLING_STAGES
def test_an_image_that_is_no_image(folder, refused, stage, arguments):
    edit_rows(folder, lambda rows: rows[:1] + [rows[1] | {"image": "images/text.png"}] + rows[2:])
    (folder.root / MANIFEST).with_name("images").joinpath("text.png").write_text("no picture")
    assert refused(stage, *arguments).startswith(f"{MANIFEST}:2: image 'images/text.png': no readable picture: ")


@SAMPLING_STAGES
def test_a_path_that_leaves_the_manifest_s_folder(folder, refused, stage, arguments):
    shutil.copyfile(next((folder.root / MANIFEST).parent.glob("images/*.png")), folder.root / "data/outside.png")
    edit_rows(folder, lambda rows: rows[:2] + [rows[2] | {"image": "../outside.png"}])
    assert (
        refused(stage, *arguments)
        == f"{MANIFEST}:3: image '../outside.png' leaves the manifest's folder; allowed: paths inside data/prompts"
    )


@SAMPLING_STAGES
def test_a_duplicate_id(folder, refused, stage, arguments):
    edit_rows(folder, lambda rows: rows[:2] + [rows[2] | {"id": rows[0]["id"]}])
    assert refused(stage, *arguments) == f"{MANIFEST}:3: id 'calibration_00' is used twice; ids must be unique"


@SAMPLING_STAGES
def test_an_empty_manifest(folder, refused, stage, arguments):
    edit_rows(folder, lambda rows: [])
    assert refused(stage, *arguments) == f"{MANIFEST}: the manifest is empty; expected at least one prompt"


def test_fewer_prompts_than_are_asked_for(folder, refused):
    folder.set("trajectories.heldout_prompts", 2)
    assert refused("trajectories") == f"{MANIFEST}: has 1 prompts with split 'heldout'; at least 2 are asked for"


# Numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_calibration_activation(folder, refused, bad):
    file = folder.root / TINY_MODEL / "transformer" / WEIGHTS
    tensors = load_file(file)
    tensors["blocks.1.ffn.net.0.proj.bias"][3] = bad
    save_file(tensors, file)
    folder.finish("model")
    message = refused("capture", *HIGH)
    place = r"high_noise block 1 ffn\.down \(prompt calibration_0\d, t = 999\)"
    assert re.fullmatch(
        place + ": NaN or Inf in a calibration activation; check the model, or use another compute.dtype", message
    )


def test_nan_in_what_the_pipeline_gives_its_denoiser(folder, refused):
    (file,) = (folder.root / TINY_MODEL / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    norm = next(key for key in tensors if key.endswith("final_layer_norm.weight"))
    tensors[norm][0] = float("nan")
    save_file(tensors, file)
    folder.finish("model")
    assert refused("trajectories").startswith(
        "prompt calibration_00: the pipeline gave its denoiser encoder_hidden_states with NaN or Inf; "
    )
