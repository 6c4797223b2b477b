"""Zarr groups in an object store: groups are read as they were written, and errors are reported."""

import json

import pytest
import torch
from zarr.storage import ObjectStore

from stepquant.compute.units import file_digests
from stepquant.errors import UserError
from stepquant.storage import object_store
from stepquant.storage.zarr_groups import open_group, read_tensor, write_group
from tests.s3 import s3_server

TENSORS = {
    "hessian": torch.randn(300, 300, generator=torch.Generator().manual_seed(0)),
    "samples": torch.arange(60).reshape(20, 3).bfloat16(),
    "latents": torch.arange(48.0).reshape(4, 3, 2, 2),
    "large": torch.arange(3_000_000).float(),  # 12 MB: sent in parts
}


@pytest.fixture
def server(monkeypatch):
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def block(tmp_path):
    """A block's folder with the groups of two sites."""
    for site in ("attn1.qkv", "ffn.down"):
        write_group(tmp_path / "block_00" / site, TENSORS, {"tokens": [3, 4]})
    return tmp_path / "block_00"


def test_moved_groups_read_as_before(server, block):
    before = file_digests(block)
    object_store.move(block, "s3://bucket/some/prefix/")
    assert [path.name for path in block.iterdir()] == ["remote.json"]
    pointer = json.loads((block / "remote.json").read_text())
    assert pointer["files"] == before and pointer["url"].startswith("s3://bucket/some/prefix/")
    place = pointer["url"].removeprefix("s3://")
    assert sorted(key.removeprefix(f"{place}/") for key in server.objects) == sorted(before)
    for site in ("attn1.qkv", "ffn.down"):
        group = open_group(block / site)
        assert group.attrs["tokens"] == [3, 4]
        for name, tensor in TENSORS.items():
            assert torch.equal(read_tensor(group, name), tensor)
        assert torch.equal(read_tensor(group, "latents", 2), TENSORS["latents"][2])
        assert torch.equal(read_tensor(group, "samples", slice(5, 9)), TENSORS["samples"][5:9])


def test_a_part_is_downloaded_alone(server, tmp_path, monkeypatch):
    """5 rows of 3 values of 2 bytes, and the index of four parts. Failed before: all 20 rows were downloaded."""
    write_group(tmp_path / "site", TENSORS, {}, part_rows={"samples": 5})
    object_store.move(tmp_path / "site", "s3://bucket")
    downloaded, get = [], ObjectStore.get

    async def counting(self, key, *args, **kwargs):
        found = await get(self, key, *args, **kwargs)
        if "samples/c" in key:
            downloaded.append(len(found))
        return found

    monkeypatch.setattr(ObjectStore, "get", counting)
    assert torch.equal(read_tensor(open_group(tmp_path / "site"), "samples", slice(5, 10)), TENSORS["samples"][5:10])
    assert sorted(downloaded) == [5 * 3 * 2, 4 * 16 + 4]


def test_a_folder_that_is_a_group_itself(server, tmp_path):
    write_group(tmp_path / "prompt", TENSORS, {"split": "heldout"})
    object_store.move(tmp_path / "prompt", "s3://bucket")
    assert torch.equal(read_tensor(open_group(tmp_path / "prompt"), "hessian"), TENSORS["hessian"])


def test_equal_folders_are_stored_once(server, tmp_path):
    for name in ("one", "two"):
        write_group(tmp_path / name, TENSORS, {})
        object_store.move(tmp_path / name, "s3://bucket")
    assert (tmp_path / "one/remote.json").read_text() == (tmp_path / "two/remote.json").read_text()


def test_a_missing_object_is_noticed(server, block):
    object_store.move(block, "s3://bucket")
    del server.objects[next(key for key in server.objects if "ffn.down/hessian/c" in key)]
    with pytest.raises(UserError, match="hessian: 0 of 1 chunks are there"):
        read_tensor(open_group(block / "ffn.down"), "hessian")


def test_a_store_that_refuses_leaves_no_pointer(server, block):
    server.refuses = True
    before = file_digests(block)
    with pytest.raises(
        UserError, match="s3://bucket/.*check the address, the credentials in the environment and the network"
    ):
        object_store.move(block, "s3://bucket")
    assert file_digests(block) == before


def test_a_store_that_refuses_to_read(server, block):
    object_store.move(block, "s3://bucket")
    group = open_group(block / "ffn.down")
    server.refuses = True
    for read in (lambda: open_group(block / "ffn.down"), lambda: read_tensor(group, "samples")):
        with pytest.raises(UserError, match="ffn.down.*check the address, the credentials"):
            read()
