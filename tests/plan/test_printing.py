from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepquant import cli
from stepquant.plan import table
from stepquant.plan.printing import make_workload
from stepquant.plan.rates import GPUS
from stepquant.profiles import read_profiles


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def real(folder):
    Path("params.yaml").write_text(read_profiles()["wan2.2-i2v-a14b"])
    return make_workload(Path("params.yaml"))


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["plan", *arguments])


def test_a_profile_on_the_usual_machines(folder):
    result = invoke("--profile", "wan2.2-i2v-a14b")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    size, calls = "28.6 GB in BF16, 8.3 GB packed", "steps per bin 5/5/5, 168 replayed calls of 32760 tokens"
    eight_bit = "in variant scheduled int8 activations in at most 0% of a video's multiply-adds"
    assert f"formats: int4 weights, int4 activations; {eight_bit} (precision.activation_budget)" in lines
    assert lines[0] == f"high_noise: 40 blocks, {size}; {calls}"
    for title in ("1 x 24 GB (RTX 4090)", "1 x 80 GB (H100 SXM)", "8 x 80 GB (H100 SXM)"):
        assert any(line.startswith(title) for line in lines)
    assert list(folder.iterdir()) == []


def test_params_of_a_made_shape_on_this_machine(made, monkeypatch):
    monkeypatch.chdir(made)
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "denoiser: 2 blocks" in result.stdout and "CPU, 1 threads" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "wan"], "no profile 'wan'; allowed: comfyui_w4a8, demo, paper, wan2.1-"),
        (["--profile", "demo"], "model.source: data/models/wan22-mini is neither a local folder nor known here"),
        (
            ["--profile", "wan2.2-i2v-a14b", "--machine", "abacus"],
            "--machine abacus; allowed: cpu, rtx4090, a100, h100, 8xh100",
        ),
        ([], "params.yaml: no such file"),
    ],
)
def test_what_cannot_be_planned(folder, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")


def test_a_machine_that_is_too_small_is_told_what_helps(real):
    small = replace(GPUS["h100"], device_bytes=8e9, host_bytes=16e9, disk_bytes=100e9)
    found = "\n".join(table.warnings(real, small))
    needed = "18.4 GB of memory and has 16.0 GB, 11.2 GB of device memory and has 8.0 GB"
    assert f"capture@high_noise needs {needed}: lower capture.calls_per_chunk" in found
    assert "trajectories needs" in found and "sample on a larger machine" in found
    assert "100.0 GB are there: lower capture.steps_per_bin" in found
    assert "lowrank" not in found


def test_a_large_machine_is_not_warned_of(real):
    assert list(table.warnings(real, GPUS["8xh100"])) == []


def test_calibration_that_is_too_thin(real):
    """16 x 512 text tokens over 5,120 channels are 1.6 for each."""
    expected = (
        "attn2.kv: 1.6 calibration tokens per column, fewer than 4; list captions in a file and name it in "
        "trajectories.text_prompts, or raise trajectories.calibration_prompts"
    )
    assert list(table.calibration_warnings(real)) == [f"{name} {expected}" for name in ("high_noise", "low_noise")]


@pytest.mark.parametrize(
    ("profile", "columns"),
    [
        ("wan2.1-t2v-14b", "seed, without pictures"),
        ("wan2.1-i2v-14b-480p", "seed and image"),
        ("wan2.2-i2v-a14b", "seed and image and optionally last_image"),
        ("wan2.1-flf2v-14b-720p", "seed and image and last_image"),
    ],
)
def test_prompts_that_are_not_there_are_asked_for(folder, profile, columns):
    """Which pictures they have depends on the model."""
    found = invoke("--profile", profile, "--machine", "h100").stdout
    asked = f"is not there; write your own prompts with id, split, prompt, negative_prompt, {columns}"
    assert f"warning: trajectories.manifest: data/calibration/my_prompts.jsonl {asked}\n" in found
    assert f"warning: generate.manifest: data/evaluation/my_prompts.jsonl {asked}\n" in found


def test_totals(folder):
    """That of dvc repro is the sum of all rows; the second leaves out variants, and the plan says how to make it."""
    lines = invoke("--profile", "wan2.2-i2v-a14b", "--machine", "h100").stdout.splitlines()
    rows = {cells[1]: cells[2:] for line in lines if len(cells := [cell.strip() for cell in line.split("│")]) > 5}
    stages = [name for name in rows if name not in ("dvc repro", "bf16 and full only", "all but sampling")]
    assert len(stages) == 1 + 1 + 2 * 5 + 1 + 7 + 8 + 8 + 1
    out = sum(float(rows[name][3].split()[0]) for name in stages if rows[name][3].endswith(" GB"))
    assert float(rows["dvc repro"][3].split()[0]) == pytest.approx(out, abs=1.0)
    assert float(rows["bf16 and full only"][3].split()[0]) < out
    commands = "dvc repro evaluate@bf16 evaluate@full && stepquant report --variant bf16 --variant full"
    assert lines[-1] == f"dvc repro makes every variant; for bf16 and full only: {commands}"


def test_a_bin_without_steps(folder):
    text = read_profiles()["wan2.2-i2v-a14b"]
    Path("params.yaml").write_text(text.replace("[1000, 975, 940, 900]", "[1000, 998.5, 998, 900]"))
    found = list(table.calibration_warnings(make_workload(Path("params.yaml"))))
    assert (
        found[0] == "bins.high_noise: no sampling step has t in bin 1; set fewer or wider bins, or raise sampling.steps"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3599, "1 h 00 min"), (3725, "1 h 02 min")]
)
def test_durations(seconds, text):
    assert table.duration(seconds) == text
