"""A wrong parameter in a real stage: exit code 2, one message that says what, where and what is allowed, and nothing
half-written."""

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.stages.conftest import HIGH, TINY_MODEL, WEIGHTS


@pytest.mark.parametrize(
    ("stage", "arguments", "key"),
    [
        ("model", (), "model.sorce"),
        ("trajectories", (), "sampling.hieght"),
        ("capture", HIGH, "capture.search_token"),
        ("lowrank", HIGH, "lowrank.rnk"),
        ("gptq", HIGH, "gptq.dampening"),
        ("clip", HIGH, "clip.ratio"),
        ("sensitivity", HIGH, "sensitivity.probe"),
        ("schedule", (), "precision.activation_budgets"),
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
    keys = "scales, refits, noise, dampings, act_order, column_block"
    assert refused("gptq", *HIGH) == f"params.yaml: gptq.noise: missing; expected the keys {keys}"


def test_an_expert_or_a_variant_that_is_not_there(refused):
    assert refused("capture", "--expert", "hgih_noise") == "--expert hgih_noise: this model has high_noise, low_noise"
    assert (
        refused("pack", "--variant", "fulll")
        == "--variant fulll; allowed: w4a16, rtn, svdquant, svdquant_gptq, one_clip, full, scheduled"
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
    assert message == "lowrank.rank: 257 for high_noise attn1.qkv, a weight of 768 x 256; allowed: 0 to 256"


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
    found = f"1000 channels cannot be divided into {fmt} groups"
    assert message == f"format.weight, high_noise ffn.down: {found}; allowed: a multiple of {group}"


def test_a_rotation_that_does_not_divide_the_channels(folder, refused):
    folder.set("rotate.hadamard_sizes", [0, 512])
    where, allowed = "rotate.hadamard_sizes, high_noise attn1.qkv", "0, or a power of two that divides 256"
    assert refused("lowrank", *HIGH) == f"{where}: Hadamard size 512 for 256 channels; allowed: {allowed}"


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
