"""Trajectories and activations in an object store: pointers stay here, and later artifacts have the same bytes."""

import json
import subprocess

from tests.pipeline.test_dvc_yaml import tree
from tests.s3 import s3_server
from tests.stages.conftest import Folder, in_process

HIGH = ("--expert", "high_noise")


def test_factors_from_an_object_store(workspace, tmp_path, monkeypatch):
    for name in ("artifacts/model", "data"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-al", workspace.root / name, tmp_path / name], check=True)
    (tmp_path / "params.yaml").write_text((workspace.root / "params.yaml").read_text())
    in_process(monkeypatch, tmp_path)
    folder = Folder(tmp_path)
    folder.set("storage.url", "s3://bucket/wan")
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        folder.finish("trajectories")
        folder.finish("capture", *HIGH)
        folder.finish("lowrank", *HIGH)
        pointers = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("artifacts/**/remote.json"))]
        kept = {f"{pointer['url'].removeprefix('s3://')}/{name}" for pointer in pointers for name in pointer["files"]}
        assert kept == set(server.objects)
    factors, stored = "artifacts/lowrank/high_noise", tmp_path / "artifacts/activations/high_noise.zarr"
    assert tree(tmp_path / factors) == tree(workspace.root / factors)
    assert sorted(file.name for file in stored.rglob("*") if file.is_file()) == [
        "manifest.json",
        *["remote.json"] * 2,
        "zarr.json",
    ]
