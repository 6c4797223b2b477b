from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepquant import cli, doctor
from stepquant.profiles import read_profiles

ROOT = Path(__file__).resolve().parent.parent


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["doctor", *arguments])


def test_this_checkout_is_ready(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "params.yaml: fine" in result.stdout
    assert "data/models/wan22-mini: high_noise with 6 blocks, low_noise with 6 blocks" in result.stdout


def test_without_params_it_says_how_to_get_some(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke()
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "params.yaml: no such file; `stepquant profile demo` writes one"


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_version", lambda name, known=doctor._version: None if name == "dvc" else known(name))
    result = invoke()
    assert result.exit_code == 1
    assert "missing: dvc, which dvc repro needs; pip install 'stepquant[pipeline]'" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rank: 32", "rank: -1"), "params.yaml: lowrank.rank: found -1"),
        (("device: cpu", "device: abacus"), "compute.device: 'abacus' cannot be used here"),
        (("source: data/models/wan22-mini", "source: nowhere"), "model.source: nowhere has no model_index.json"),
        (("source: data/models/wan22-mini", "source: owner/name"), None),
    ],
)
def test_what_the_params_ask_for(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(read_profiles()["demo"].replace(*change, 1))
    result = invoke()
    assert result.exit_code == (1 if message else 0)
    assert (message or "owner/name is not a folder here; stage model will download it") in result.stdout


@pytest.mark.parametrize(
    ("change", "package", "message"),
    [
        (
            ("url: null", "url: s3://bucket"),
            "obstore",
            "missing: obstore, which storage.url needs; pip install 'stepquant[s3]'",
        ),
        (
            ("executor: local", "executor: ray"),
            "ray",
            "missing: ray, which compute.executor: ray needs; pip install 'stepquant[ray]'",
        ),
        (("url: null", "url: null"), "obstore", None),
    ],
)
def test_what_only_some_params_need(tmp_path, monkeypatch, change, package, message):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(
        read_profiles()["demo"].replace(*change, 1).replace("source: data/models/wan22-mini", "source: owner/name")
    )
    monkeypatch.setattr(
        doctor, "_version", lambda name, known=doctor._version: None if name == package else known(name)
    )
    result = invoke()
    assert result.exit_code == (1 if message else 0)
    assert (message or "extras: none needed, none missing") in result.stdout


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: Path(path) == tmp_path)
    result = invoke()
    assert result.exit_code == 1
    assert "DVC's state: " in result.stdout and "set DVC_SITE_CACHE_DIR to a folder of yours" in result.stdout
