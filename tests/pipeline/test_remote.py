"""Trajectories and activations in an object store: DVC keeps pointers, and all later artifacts have the same bytes."""

import json

from tests.pipeline.test_dvc_yaml import tree
from tests.s3 import s3_server


def test_factors_from_an_object_store(workspace_copy, monkeypatch):
    factors, stored = (
        workspace_copy.root / "artifacts/lowrank/high_noise",
        workspace_copy.root / "artifacts/activations/high_noise.zarr",
    )
    expected = tree(factors)
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        workspace_copy.set("storage.url", "s3://bucket/wan")
        workspace_copy.run("dvc", "repro", "--single-item", "trajectories", "capture@high_noise", "lowrank@high_noise")
        assert tree(factors) == expected
        pointers = [
            json.loads(file.read_text()) for file in sorted(workspace_copy.root.glob("artifacts/**/remote.json"))
        ]
        kept = {f"{pointer['url'].removeprefix('s3://')}/{name}" for pointer in pointers for name in pointer["files"]}
        assert kept == set(server.objects)
    assert sorted(file.name for file in stored.rglob("*") if file.is_file()) == [
        "manifest.json",
        *["remote.json"] * 2,
        "zarr.json",
    ]
