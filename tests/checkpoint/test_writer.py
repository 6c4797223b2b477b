import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.checkpoint.writer import write_checkpoint, write_expert
from stepquant.errors import UserError
from stepquant.models.weights import open_weights


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture
def expert(source, tools):
    """Source folder, settings and blocks of one expert."""
    settings = tools.settings("transformer", "nvfp4", "nvfp4", rank=8)
    return source / "transformer", settings, lambda: tools.blocks(source / "transformer", settings)


def test_every_tensor_is_on_disk(expert, tmp_path):
    source, settings, blocks = expert
    write_expert(source, tmp_path / "out", settings, blocks(), dtype=torch.float32)
    weights, original = open_weights(tmp_path / "out"), open_weights(source)
    expected = {key: original.get(key) for key in original if key.removesuffix(".weight") not in settings.targets}
    for _, block in blocks():
        for target, packed in block.items():
            expected |= {f"{target}.{name}": tensor for name, tensor in packed.tensors().items()}
    assert set(weights) == set(expected)
    for key, tensor in expected.items():
        stored = weights.get(key)
        assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(bits(stored), bits(tensor)), key


def test_shards_index_and_config(expert, tmp_path):
    source, settings, blocks = expert
    write_expert(source, tmp_path / "out", settings, blocks(), dtype=torch.float32)
    shards = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index_name = "diffusion_pytorch_model.safetensors.index.json"
    assert sorted(files_of(tmp_path / "out")) == sorted([*shards, index_name, "config.json"])
    for i in range(2):
        keys = load_file(tmp_path / "out" / shards[i])
        assert all(key.startswith(f"blocks.{i}.") for key in keys)
        # Linears with mean subtraction have their own bias; no shard has a weight.
        mine = {target for target in settings.targets if target.startswith(f"blocks.{i}.")}
        assert {key.removesuffix(".bias") for key in keys if key.endswith(".bias")} == mine
    rest = load_file(tmp_path / "out" / shards[2])
    assert not any(f"{target}.{name}" in rest for target in settings.targets for name in ("weight", "bias"))
    index = json.loads((tmp_path / "out" / index_name).read_text())
    tensors = [t for shard in shards for t in load_file(tmp_path / "out" / shard).values()]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config") == settings.to_config()
    assert config == json.loads((source / "config.json").read_text())


def test_same_input_same_bytes(expert, tmp_path):
    """Also when the blocks come in another order."""
    source, settings, blocks = expert
    write_expert(source, tmp_path / "a", settings, blocks(), dtype=torch.float32)
    write_expert(source, tmp_path / "b", settings, blocks(), dtype=torch.float32)
    write_expert(source, tmp_path / "c", settings, reversed(list(blocks())), dtype=torch.float32)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_sharded_source(expert, tmp_path):
    source, settings, blocks = expert
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(source / "config.json", sharded)
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    weight_map = {key: f"diffusion_pytorch_model-0000{1 + i % 3}-of-00003.safetensors" for i, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file({key: t for key, t in tensors.items() if weight_map[key] == name}, sharded / name)
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_expert(source, tmp_path / "a", settings, blocks(), dtype=torch.float32)
    write_expert(sharded, tmp_path / "b", settings, blocks(), dtype=torch.float32)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_one_block_at_a_time(expert, tmp_path):
    """When a block is requested, the previous one has been freed."""
    source, settings, blocks = expert
    alive = []

    def watched():
        iterator = blocks()
        while (item := next(iterator, None)) is not None:
            gc.collect()
            assert [ref() for ref in alive if ref() is not None] == []
            alive.extend(weakref.ref(packed.qweight) for packed in item[1].values())
            yield item
            del item

    write_expert(source, tmp_path / "out", settings, watched(), dtype=torch.float32)
    assert len(alive) == len(settings.targets)


def test_blocks_must_match_the_settings(expert, tmp_path):
    source, settings, blocks = expert
    with pytest.raises(ValueError, match="the blocks have 10 linears; they must be the 20 targets"):
        write_expert(source, tmp_path / "out", settings, list(blocks())[:1], dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(expert, tmp_path):
    source, settings, blocks = expert

    def failing():
        yield next(iter(blocks()))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_expert(source, tmp_path / "out", settings, failing(), dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_replaced(expert, tmp_path):
    source, settings, blocks = expert
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "block-00009.safetensors").write_bytes(b"half")
    write_expert(source, tmp_path / "out", settings, blocks(), dtype=torch.float32)
    write_expert(source, tmp_path / "clean", settings, blocks(), dtype=torch.float32)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "out"]


def test_existing_folder(expert, tmp_path):
    source, settings, blocks = expert
    with pytest.raises(UserError, match="exists; remove it first"):
        write_expert(source, tmp_path, settings, blocks(), dtype=torch.float32)


def test_source_without_config(expert, tmp_path):
    _, settings, _ = expert
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="config.json: no such file"):
        write_expert(tmp_path / "empty", tmp_path / "out", settings, [], dtype=torch.float32)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_broken_json(source, tools, tmp_path, name):
    broken = tmp_path / "source"
    shutil.copytree(source, broken)
    (broken / name).write_text("{")
    with pytest.raises(UserError, match=f"{name}: not JSON"):
        write_checkpoint(broken, tmp_path / "out", experts(source, tools), dtype=torch.float32, flow_shift=5.0)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_source_is_quantized_already(expert, tmp_path):
    source, settings, blocks = expert
    write_expert(source, tmp_path / "once", settings, blocks(), dtype=torch.float32)
    with pytest.raises(UserError, match="is already quantized"):
        write_expert(tmp_path / "once", tmp_path / "twice", settings, blocks(), dtype=torch.float32)


def test_source_lacks_a_target(expert, tmp_path):
    source, settings, blocks = expert
    other = tmp_path / "source"
    shutil.copytree(source, other)
    tensors = load_file(other / "diffusion_pytorch_model.safetensors")
    del tensors["blocks.1.ffn.net.2.weight"]
    save_file(tensors, other / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="no tensor named 'blocks.1.ffn.net.2.weight'"):
        write_expert(other, tmp_path / "out", settings, blocks(), dtype=torch.float32)


def experts(source, tools):
    settings = {name: tools.settings(name, "int4", "int4", rank=0) for name in tools.edges}
    return {name: (s, tools.blocks(source / name, s)) for name, s in settings.items()}


def test_checkpoint_is_a_complete_pipeline(source, tools, tmp_path):
    write_checkpoint(source, tmp_path / "out", experts(source, tools), dtype=torch.float32, flow_shift=5.0)
    original, written = files_of(source), files_of(tmp_path / "out")
    kept = {name: content for name, content in original.items() if not name.startswith("transformer")}
    assert {name: content for name, content in written.items() if not name.startswith("transformer")} == kept
    assert {"transformer/config.json", "transformer_2/config.json", "model_index.json"} <= set(written)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_expert_that_is_not_quantized_is_copied(source, tools, tmp_path):
    low = {"transformer_2": experts(source, tools)["transformer_2"]}
    write_checkpoint(source, tmp_path / "out", low, dtype=torch.float32, flow_shift=5.0)
    assert files_of(source / "transformer") == files_of(tmp_path / "out" / "transformer")
    assert "quantization_config" in json.loads((tmp_path / "out" / "transformer_2" / "config.json").read_text())


def test_no_pipeline(source, tools, tmp_path):
    with pytest.raises(UserError, match="model_index.json: no such file"):
        write_checkpoint(source / "transformer", tmp_path / "out", {}, dtype=torch.float32, flow_shift=5.0)


def test_unknown_component(source, tools, tmp_path):
    with pytest.raises(UserError, match="no component 'unet'; it has scheduler, transformer, transformer_2, vae"):
        write_checkpoint(source, tmp_path / "out", {"unet": (None, [])}, dtype=torch.float32, flow_shift=5.0)


def test_missing_component(source, tools, tmp_path):
    broken = tmp_path / "source"
    shutil.copytree(source, broken)
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match="vae: no such folder, but model_index.json names"):
        write_checkpoint(broken, tmp_path / "out", experts(source, tools), dtype=torch.float32, flow_shift=5.0)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_pickles_are_not_copied(source, tools, tmp_path):
    mixed = tmp_path / "source"
    shutil.copytree(source, mixed)
    (mixed / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    write_checkpoint(mixed, tmp_path / "out", experts(source, tools), dtype=torch.float32, flow_shift=5.0)
    assert files_of(tmp_path / "out" / "vae") == files_of(source / "vae")
    (mixed / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="vae: found only pickled weights .diffusion_pytorch_model.bin"):
        write_checkpoint(mixed, tmp_path / "again", experts(source, tools), dtype=torch.float32, flow_shift=5.0)
