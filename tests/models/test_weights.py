import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from stepquant.errors import UserError
from stepquant.models.weights import open_weights, read_header


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(4, 6, generator=generator).bfloat16(),
        "a.weight": torch.randn(3, generator=generator),
        "c.codes": torch.arange(8, dtype=torch.uint8).reshape(2, 4),
        "d.scales": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
    }


def shard(folder, tensors, stem="diffusion_pytorch_model"):
    keys = sorted(tensors)
    files = {f"{stem}-00001-of-00002.safetensors": keys[:2], f"{stem}-00002-of-00002.safetensors": keys[2:]}
    for name, part in files.items():
        save_file({k: tensors[k] for k in part}, folder / name)
    weight_map = {k: name for name, part in files.items() for k in part}
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_what_was_saved(tmp_path, tensors, stem, sharded):
    if sharded:
        shard(tmp_path, tensors, stem)
    else:
        save_file(tensors, tmp_path / f"{stem}.safetensors")
    weights = open_weights(tmp_path)
    assert list(weights) == sorted(tensors)
    assert len(weights) == 4 and "a.weight" in weights and "z" not in weights
    for key, tensor in tensors.items():
        assert weights.shape(key) == tuple(tensor.shape)
        assert weights.dtype(key) == tensor.dtype
        info = weights.info(key)
        assert info.nbytes == tensor.numel() * tensor.element_size()
        stored = info.file.read_bytes()[info.start : info.start + info.nbytes]
        assert stored == tensor.view(torch.uint8).numpy().tobytes()
        assert torch.equal(weights.get(key).view(torch.uint8), tensor.view(torch.uint8))


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_weights(tmp_path / "transformer")


def test_missing_weights(tmp_path):
    with pytest.raises(UserError, match="no weights; expected diffusion_pytorch_model.safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "weights.pt", "model.ckpt"])
def test_pickle_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=f"pickled weights .{name}.*convert them to safetensors"):
        open_weights(tmp_path)


def test_unknown_key(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no tensor named 'x' among its 4 tensors"):
        open_weights(tmp_path).get("x")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file(tmp_path, tensors, keep):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="truncated"):
        open_weights(tmp_path)


@pytest.mark.parametrize("header", [b"not json", b"[]", b'{"a": {"dtype": "F32"}}', b'{"a": 1}'])
def test_broken_header(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="header cannot be read"):
        read_header(file)


def test_unknown_dtype(tmp_path):
    header = json.dumps({"a": {"dtype": "Q4_0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(UserError, match="'a' has dtype Q4_0; allowed: F64"):
        read_header(file)


def test_shard_missing(tmp_path, tensors):
    shard(tmp_path, tensors)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="00002-of-00002.safetensors', which is no file"):
        open_weights(tmp_path)


def test_shard_outside_the_folder(tmp_path, tensors):
    inner = tmp_path / "inner"
    inner.mkdir()
    index = shard(inner, tensors)
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "other.safetensors")
    index.write_text(json.dumps({"weight_map": {"a.weight": "../other.safetensors"}}))
    with pytest.raises(UserError, match="is no file in"):
        open_weights(inner)


def test_index_and_shards_disagree(tmp_path, tensors):
    index = shard(tmp_path, tensors)
    content = json.loads(index.read_text())
    listed = dict(content["weight_map"])

    content["weight_map"] = {k: v for k, v in listed.items() if k != "a.weight"}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="holds tensor 'a.weight', which .* does not list there"):
        open_weights(tmp_path)

    content["weight_map"] = listed | {"extra": listed["a.weight"]}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="lists tensor 'extra'"):
        open_weights(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="not a safetensors index"):
        open_weights(tmp_path)
