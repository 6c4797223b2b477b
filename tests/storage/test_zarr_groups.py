import json

import numpy as np
import pytest
import torch

from stepquant.errors import UserError
from stepquant.storage.zarr_groups import array_shape, group_metadata, open_group, read_tensor, write_group


def every_bfloat16():
    """All 65536 bit patterns: NaNs with payloads, infinities, subnormals, both zeros."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "three": torch.randn(3, 2, 5, generator=generator),
        "four": torch.randn(2, 3, 2, 2, generator=generator).bfloat16(),
        "matrix": torch.randn(4, 6, generator=generator).T,
        "vector": torch.randn(7, generator=generator, dtype=torch.float64),
        "zeros": torch.zeros(2, 3, 4),
        "empty": torch.zeros(0, 8),
        "codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    }


@pytest.fixture
def folder(tmp_path, tensors):
    write_group(tmp_path / "group", tensors, {"tokens": [3, 4]})
    return tmp_path / "group"


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_are_read_as_written(folder, tensors):
    group = open_group(folder)
    assert group.attrs["tokens"] == [3, 4]
    for name, tensor in tensors.items():
        read = read_tensor(group, name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    assert torch.equal(read_tensor(group, "three", 1), tensors["three"][1])
    assert torch.equal(read_tensor(group, "four", 1), tensors["four"][1])


def test_bfloat16_is_kept_bit_for_bit(tmp_path):
    tensor = every_bfloat16()
    write_group(tmp_path / "group", {"x": tensor}, {})
    read = read_tensor(open_group(tmp_path / "group"), "x")
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.view(torch.int16), tensor.view(torch.int16))


def test_arrays_are_uncompressed_in_one_file_or_one_per_index(folder, tensors):
    stored = files(folder)
    assert {name for name in stored if name.startswith("three/c/")} == {f"three/c/{i}/0/0" for i in range(3)}
    assert stored["three/c/1/0/0"] == tensors["three"][1].numpy().tobytes()
    assert {name for name in stored if name.startswith("matrix/c/")} == {"matrix/c/0/0"}
    assert stored["matrix/c/0/0"] == np.ascontiguousarray(tensors["matrix"].numpy()).tobytes()


@pytest.mark.parametrize("rows", [1, 3, 10, 11])
def test_an_array_in_parts_is_one_file(tmp_path, rows):
    """Ten rows of four values; the last part is filled up with zeros, and 16 bytes per part and 4 are the index."""
    tensor = torch.arange(40, dtype=torch.float64).reshape(10, 4)
    write_group(tmp_path / "group", {"x": tensor, "y": tensor}, {}, part_rows={"x": rows})
    group, parts = open_group(tmp_path / "group"), -(-10 // rows)
    for index in (slice(None), slice(0, 1), slice(2, 7), slice(9, 10), 4):
        assert torch.equal(read_tensor(group, "x", index), tensor[index])
    assert array_shape(group, "x") == array_shape(group, "y") == (10, 4)
    content = files(tmp_path / "group")["x/c/0/0"]
    assert content[: 40 * 8] == tensor.numpy().tobytes()
    assert len(content) == parts * (rows * 32 + 16) + 4
    assert len(files(tmp_path / "group")) == 5


def test_the_same_tensors_give_the_same_bytes(folder, tensors, tmp_path):
    write_group(tmp_path / "again", tensors, {"tokens": [3, 4]})
    assert files(tmp_path / "again") == files(folder)


def test_the_completion_marker_comes_last(tmp_path, tensors):
    class Broken:
        def detach(self):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_group(tmp_path / "group", tensors | {"last": Broken()}, {"tokens": [1]})
    assert refusal(open_group, tmp_path / "group").endswith(
        "group: this Zarr group was never finished; remove it and run its stage again"
    )


def test_a_missing_group(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        assert refusal(open_group, folder) == f"{folder}: no such Zarr group; run the stage that writes it"


def test_truncated_metadata(folder):
    (folder / "zarr.json").write_text("{")
    assert refusal(open_group, folder).startswith(f"{folder}: broken Zarr metadata (")


def test_a_missing_array(folder):
    for read in (read_tensor, array_shape):
        assert refusal(read, open_group(folder), "absent").endswith("group/absent: no such array")


def test_a_deleted_chunk_is_refused_not_read_as_zeros(folder):
    (folder / "three/c/1/0/0").unlink()
    expected = "group/three: 2 of 3 chunks are there; remove the folder and run its stage again"
    assert refusal(read_tensor, open_group(folder), "three").endswith(expected)
    assert refusal(read_tensor, open_group(folder), "three", 0).endswith(expected)


@pytest.mark.parametrize("size", [0, 5])
def test_a_truncated_chunk(folder, size):
    chunk = folder / "vector/c/0"
    chunk.write_bytes(chunk.read_bytes()[: 8 * size])
    assert "group/vector: a chunk is truncated (" in refusal(read_tensor, open_group(folder), "vector")


def test_metadata_of_a_group_with_members_of_others(folder, tensors, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    folder.rename(outer / "member")
    (outer / "zarr.json").write_text(group_metadata({"expert": "low_noise"}))
    group = open_group(outer)
    assert dict(group.attrs) == {"expert": "low_noise", "complete": True}
    assert torch.equal(read_tensor(group, "member/vector"), tensors["vector"])
    assert json.loads(group_metadata({"b": 1, "a": 2})) == json.loads(group_metadata({"a": 2, "b": 1}))
