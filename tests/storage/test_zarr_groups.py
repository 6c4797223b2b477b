import json

import numpy as np
import pytest
import torch

from stepquant.errors import UserError
from stepquant.storage.zarr_groups import group_metadata, open_group, read_tensor, write_group


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


def test_what_is_written_is_read(folder, tensors):
    group = open_group(folder)
    assert group.attrs["tokens"] == [3, 4]
    for name, tensor in tensors.items():
        read = read_tensor(group, name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    assert torch.equal(read_tensor(group, "three", 1), tensors["three"][1])
    assert torch.equal(read_tensor(group, "four", 1), tensors["four"][1])


def test_bfloat16_comes_back_bit_for_bit(tmp_path):
    tensor = every_bfloat16()
    write_group(tmp_path / "group", {"x": tensor}, {})
    read = read_tensor(open_group(tmp_path / "group"), "x")
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.view(torch.int16), tensor.view(torch.int16))


def test_arrays_lie_uncompressed_in_one_file_per_index_or_one_in_all(folder, tensors):
    stored = files(folder)
    assert {name for name in stored if name.startswith("three/c/")} == {f"three/c/{i}/0/0" for i in range(3)}
    assert stored["three/c/1/0/0"] == tensors["three"][1].numpy().tobytes()
    assert {name for name in stored if name.startswith("matrix/c/")} == {"matrix/c/0/0"}
    assert stored["matrix/c/0/0"] == np.ascontiguousarray(tensors["matrix"].numpy()).tobytes()


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


def test_a_group_that_is_not_there(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        assert refusal(open_group, folder) == f"{folder}: no such Zarr group; run the stage that writes it"


def test_a_group_whose_metadata_is_cut_off(folder):
    (folder / "zarr.json").write_text("{")
    assert refusal(open_group, folder).startswith(f"{folder}: broken Zarr metadata (")


def test_an_array_that_is_not_there(folder):
    assert refusal(read_tensor, open_group(folder), "absent").endswith("group/absent: no such array")


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


def test_metadata_of_a_group_whose_members_are_written_elsewhere(folder, tensors, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    folder.rename(outer / "member")
    (outer / "zarr.json").write_text(group_metadata({"expert": "low_noise"}))
    group = open_group(outer)
    assert dict(group.attrs) == {"expert": "low_noise", "complete": True}
    assert torch.equal(read_tensor(group, "member/vector"), tensors["vector"])
    assert json.loads(group_metadata({"b": 1, "a": 2})) == json.loads(group_metadata({"a": 2, "b": 1}))
