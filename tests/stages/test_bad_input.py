"""A user's mistake, or a disk's refusal, in a real stage: exit code 2, one message that says what, where and what is
allowed, and nothing half-written."""

import errno
import json
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stages import _blocks
from tests.stages.conftest import MANIFEST, TINY_MODEL

HIGH = ("--expert", "high_noise")
WEIGHTS = "diffusion_pytorch_model.safetensors"


# Parameters


@pytest.mark.parametrize(
    ("stage", "arguments", "key"),
    [
        ("model", (), "model.sorce"),
        ("trajectories", (), "sampling.hieght"),
        ("capture", HIGH, "capture.search_token"),
        ("lowrank", HIGH, "lowrank.rnk"),
        ("gptq", HIGH, "gptq.dampening"),
        ("clip", HIGH, "clip.ratio"),
        ("pack", ("--variant", "rtn"), "format.weights"),
        ("generate", ("--variant", "bf16"), "generate.prompt"),
        ("evaluate", ("--variant", "bf16"), "evaluate.sed"),
        ("report", (), "report.titel"),
    ],
)
def test_an_unknown_parameter(folder, refused, stage, arguments, key):
    folder.set(key, 1)
    message = refused(stage, *arguments)
    assert message.startswith(f"params.yaml: {key}: unknown parameter; allowed: ")


def test_an_unknown_parameter_of_one_expert(folder, refused):
    folder.set("experts.high_noise.lowrank", {"rnk": 4})
    message = refused("lowrank", *HIGH)
    assert message == "params.yaml: experts.high_noise.lowrank over lowrank.rnk: unknown parameter; allowed: rank, seed"


def test_a_missing_parameter(folder, refused):
    text = (folder.root / "params.yaml").read_text()
    (folder.root / "params.yaml").write_text(text.replace("  noise: 0.25\n", "", 1))
    assert (
        refused("gptq", *HIGH)
        == "params.yaml: gptq.noise: missing; expected the keys scales, refits, noise, dampings, act_order, column_block"
    )


def test_an_expert_or_a_variant_that_is_not_there(refused):
    assert refused("capture", "--expert", "hgih_noise") == "--expert hgih_noise: this model has high_noise, low_noise"
    assert (
        refused("pack", "--variant", "fulll")
        == "--variant fulll; allowed: w4a16, rtn, svdquant, svdquant_gptq, one_clip, full"
    )


def test_a_device_that_is_not_there(folder, refused):
    folder.set("compute.device", "gpu")
    assert refused("capture", *HIGH).startswith("compute.device: 'gpu' cannot be used here: ")


@pytest.mark.parametrize(
    ("edges", "what"),
    [
        ([1000, 950, 920], "do not cover [900, 1000]; allowed: first and last edge at or beyond it"),
        ([990, 900], "do not cover [900, 1000]; allowed: first and last edge at or beyond it"),
        ([1000, 940, 970, 900], "overlap or repeat; allowed: at least two strictly ordered values of t"),
        ([1000, 950, 950, 900], "overlap or repeat; allowed: at least two strictly ordered values of t"),
    ],
)
def test_bins_that_do_not_cover_or_overlap(folder, refused, edges, what):
    folder.set("bins.high_noise", edges)
    assert refused("capture", *HIGH) == f"bins.high_noise: edges {[float(e) for e in edges]} {what}"


def test_a_bin_that_no_recorded_step_falls_into(folder, refused):
    folder.set("bins.high_noise", [1000, 950, 900])
    message = refused("capture", *HIGH)
    assert message.startswith("bins: no recorded calibration step has t in bin 1, (900, 950]; use fewer or wider bins")


@pytest.mark.parametrize("key", ["lowrank.rank", "experts.high_noise.lowrank"])
def test_a_rank_larger_than_the_layer(folder, refused, key):
    folder.set(key, 257 if key == "lowrank.rank" else {"rank": 257})
    message = refused("lowrank", *HIGH)
    assert message == "lowrank.rank: 257 for high_noise attn1.out, a weight of 256 x 256; allowed: 0 to 256"


@pytest.mark.parametrize(
    ("kind", "fmt", "group"), [("weight", "int4", 64), ("activation", "mxfp4", 32), ("weight", "nvfp4", 16)]
)
@pytest.mark.parametrize(("stage", "arguments"), [("lowrank", HIGH), ("pack", ("--variant", "rtn"))])
def test_channels_that_the_group_of_the_format_does_not_divide(folder, refused, stage, arguments, kind, fmt, group):
    """1000 = 15 x 64 + 40 = 31 x 32 + 8 = 62 x 16 + 8."""
    narrow_feed_forward(folder.root / TINY_MODEL / "transformer", 1000)
    folder.finish("model")
    other = "activation" if kind == "weight" else "weight"
    folder.set(f"format.{kind}", fmt)
    folder.set(f"format.{other}", fmt)
    message = refused(stage, *arguments)
    assert (
        message
        == f"format.weight, high_noise ffn.down: 1000 channels cannot be cut into {fmt} groups; allowed: a multiple of {group}"
    )


def test_a_rotation_that_does_not_divide_the_channels(folder, refused):
    folder.set("rotate.hadamard_sizes", [0, 512])
    message = refused("lowrank", *HIGH)
    assert (
        message
        == "rotate.hadamard_sizes, high_noise attn1.out: Hadamard size 512 for 256 channels; allowed: 0, or a power of two that divides 256"
    )


def narrow_feed_forward(expert, size):
    """Cut the inner width of every feed-forward in an expert's folder."""
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"ffn_dim": size}))
    cuts = {
        "net.0.proj.weight": (slice(size),),
        "net.0.proj.bias": (slice(size),),
        "net.2.weight": (slice(None), slice(size)),
    }
    tensors = load_file(expert / WEIGHTS)
    for key in tensors:
        for end, cut in cuts.items():
            if key.endswith(end):
                tensors[key] = tensors[key][cut].contiguous()
    save_file(tensors, expert / WEIGHTS)


# The source model


def spoil(file, how):
    """Make weights missing, truncated or pickled; gives what the message must say."""
    whole = file.read_bytes()
    file.unlink()
    if how == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
        return f"{file}: truncated or damaged: {len(whole) // 2} bytes, its header says {len(whole)}; copy or download it again"
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
    message = refused("model")
    assert (
        message
        == "model.source: data/models/wan/mini has no model_index.json; expected a diffusers folder, or a hub id such as owner/name"
    )


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
    assert refused(stage, *arguments).startswith(f"{MANIFEST}:2: image 'images/text.png' is no readable picture: ")


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
    shutil.rmtree(folder.root / ".units/capture@high_noise")
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
    shutil.rmtree(folder.root / ".units/trajectories")
    assert refused("trajectories").startswith(
        "prompt calibration_00: the pipeline gave its denoiser embeddings with NaN or Inf; "
    )


# The disk


def redo(folder, stage):
    """Forget a stage's finished units, so that it has to write them again."""
    shutil.rmtree(folder.root / ".units" / stage)


def test_a_full_disk_while_a_small_file_is_written(refused, disk):
    disk.refuse(errno.ENOSPC, "artifacts/model/.manifest.json.tmp")
    assert refused("model") == (
        "artifacts/model/.manifest.json.tmp: No space left on device; free space or make the folder writable, then run the same command again"
    )


@pytest.mark.parametrize(
    ("stage", "arguments", "label", "array"),
    [("trajectories", (), "trajectories", "embeddings"), ("capture", HIGH, "capture@high_noise", "attn2.q/channels")],
)
def test_a_full_disk_while_a_zarr_group_is_written(folder, refused, disk, stage, arguments, label, array):
    """Some arrays fit, this one does not."""
    redo(folder, label)
    before = folder.artifacts()
    disk.refuse(errno.ENOSPC, f".units/{label}/*.partial/{array}/c/*")
    assert "No space left on device; free space or make the folder writable" in refused(stage, *arguments)
    disk.allow()
    folder.finish(stage, *arguments)
    assert folder.artifacts() == before


def test_a_full_disk_while_factors_are_written(folder, refused, monkeypatch):
    def full(tensors, path):
        # What safetensors raises on a full tmpfs; it has no errno.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(_blocks, "save_file", full)
    message = refused("lowrank", *HIGH)
    assert (
        message
        == f"a file below {folder.root}: No space left on device; free space or make the folder writable, then run the same command again"
    )


def test_a_full_disk_while_units_are_gathered(folder, refused, disk):
    """Neither links nor copies fit: the finished out stays, the units stay, and the same command ends well later."""
    before = folder.artifacts()
    disk.refuse(errno.ENOSPC, "artifacts/activations/*", ("os.link", "open"))
    assert "No space left on device" in refused("capture", *HIGH)
    disk.allow()
    folder.finish("capture", *HIGH)
    assert folder.artifacts() == before


def test_a_full_disk_while_a_checkpoint_is_written(refused, disk):
    disk.refuse(errno.ENOSPC, "artifacts/checkpoints/*/vae/*", ("open",))
    assert "No space left on device" in refused("pack", "--variant", "rtn")


READ_ONLY = "Read-only file system; free space or make the folder writable, then run the same command again"


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("model", ()),
        ("trajectories", ()),
        ("capture", HIGH),
        ("lowrank", HIGH),
        ("pack", ("--variant", "rtn")),
        ("generate", ("--variant", "bf16")),
    ],
)
def test_a_read_only_artifacts_folder(refused, disk, stage, arguments):
    disk.refuse(errno.EROFS, "artifacts*")
    message = refused(stage, *arguments)
    assert re.match(r"(\S*/)?artifacts/", message) and message.endswith(f": {READ_ONLY}")


def test_a_finished_checkpoint_on_a_read_only_disk(folder, refused, disk):
    folder.finish("pack", "--variant", "rtn")
    disk.refuse(errno.EROFS, "artifacts*")
    assert refused("pack", "--variant", "rtn") == f"artifacts/checkpoints/rtn: {READ_ONLY}"
