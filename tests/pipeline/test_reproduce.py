import json
import os
import subprocess
from pathlib import Path

import pytest

from ci.reproduce import (
    accept,
    copy_sources,
    hash_differences,
    metric_differences,
    pipeline_environment,
    reference_differences,
    rerun_differences,
)

METRICS = {
    "full": {"psnr": 40.0, "layer_error": {"low_noise": 0.2}, "size_ratio": 0.5},
    "rtn": {"psnr": 30.0, "layer_error": {"low_noise": 0.8}, "size_ratio": 0.4},
    "bf16": {"psnr": None, "layer_error": {}, "size_ratio": 1},
}


def changed(variant: str, key: str, value) -> dict:
    return METRICS | {variant: METRICS[variant] | {key: value}}


# Spreads: psnr 0.5 (rtn), layer_error 0.01 of 0.8, size_ratio none. Twice that is allowed outside of the runs' range:
# full.psnr 39 to 41, rtn.psnr 29 to 31.5, full.layer_error 0.195 to 0.205.
RUNS = [METRICS, changed("rtn", "psnr", 30.5), changed("rtn", "layer_error", {"low_noise": 0.81})]


@pytest.mark.parametrize(
    "metrics, key",
    [
        (changed("full", "psnr", 41.01), "full.psnr"),
        (changed("full", "psnr", 38.99), "full.psnr"),
        (changed("rtn", "psnr", 31.6), "rtn.psnr"),
        (changed("full", "psnr", float("nan")), "full.psnr"),
        (changed("full", "layer_error", {"low_noise": 0.2051}), "full.layer_error.low_noise"),
        (changed("full", "layer_error", {}), "full.layer_error.low_noise"),
        (changed("full", "layer_error", {"low_noise": 0.2, "high_noise": 0.2}), "full.layer_error.high_noise"),
        (changed("full", "size_ratio", 0.5001), "full.size_ratio"),
        (changed("full", "psnr", None), "full.psnr"),
        (changed("bf16", "psnr", 40.0), "bf16.psnr"),
        ({"full": METRICS["full"], "rtn": METRICS["rtn"]}, "bf16.psnr"),
        (METRICS | {"one_clip": {"psnr": 30.0}}, "one_clip.psnr"),
    ],
)
def test_a_number_too_far_from_the_runs_is_named(metrics, key):
    line = metric_differences(RUNS, metrics)[0]
    assert line.startswith(f"metrics.json {key}: ")


@pytest.mark.parametrize(
    "metrics",
    [
        METRICS,
        changed("full", "psnr", 39.01),
        changed("full", "psnr", 40.99),
        changed("rtn", "psnr", 31.49),
        changed("full", "layer_error", {"low_noise": 0.2049}),
    ],
)
def test_numbers_near_the_runs(metrics):
    assert metric_differences(RUNS, metrics) == []


def test_a_changed_a_missing_and_a_new_hash_are_named():
    first, second = {"a: x": "1", "b: y": "2", "c: z": "3"}, {"a: x": "1", "b: y": "9", "d: w": "4"}
    assert [line.split(": ")[0] for line in hash_differences(first, second)] == ["b", "c", "d"]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout in small: one stage that always writes the same, one that writes the time; both have run."""
    root = tmp_path / "checkout"
    for name in ("stages", "lib", "data/models", "data/calibration", "data/evaluation", "data/reference", ".dvc"):
        (root / name).mkdir(parents=True)
    for name in ("params.yaml", ".dvcignore", ".dvc/config"):
        (root / name).touch()
    (root / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    stages = {"same": {"cmd": "echo 1 > same", "outs": ["same"]}, "time": {"cmd": "date +%N > time", "outs": ["time"]}}
    (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    return root


def repro(root: Path) -> None:
    environment = pipeline_environment(root) | {"DVC_SITE_CACHE_DIR": os.fspath(root.parent / "site")}
    subprocess.run(["python", "-m", "dvc", "repro", "--quiet"], cwd=root, env=environment, check=True)


def test_a_stage_that_gives_other_bytes_is_named(checkout):
    repro(checkout)
    (line,) = rerun_differences(checkout, pipeline_environment(checkout))
    assert line.startswith("time: time: ")


def test_a_copy_brings_nothing_that_a_run_made(checkout, tmp_path):
    repro(checkout)
    (checkout / "lib" / "__pycache__").mkdir()
    (checkout / "lib" / "__pycache__" / "old.pyc").touch()
    copy_sources(checkout, tmp_path / "copy")
    files = {
        path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*") if path.is_file()
    }
    assert files == {".dvc/config", ".dvc/config.local", ".dvcignore", "dvc.yaml", "params.yaml"}


def test_accepted_metrics_are_a_reference_run(checkout):
    reference = checkout / "data/reference/metrics.json"
    other = changed("full", "psnr", 44.0)
    reference.write_text(json.dumps({"about": ["why"], "runs": {"other": other}}))
    (checkout / "metrics.json").write_text(json.dumps(METRICS))
    assert len(reference_differences(checkout)) == 1
    accept(checkout, "this one")
    assert reference_differences(checkout) == []
    assert json.loads(reference.read_text()) == {"about": ["why"], "runs": {"other": other, "this one": METRICS}}
