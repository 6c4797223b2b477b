"""Artifacts and units that lost a file or a part of one: a message that names the way out, and the way out."""

import shutil

import pytest

from stages import capture
from tests.stages.conftest import HIGH


def in_place_of(file, content):
    """Other content under the same name. Not written into the file, which other tests have links to."""
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_factors_that_are_missing_or_truncated(folder, refused, how):
    """And the way out that the message names: the stage's units are whole, so it computes nothing."""
    folder.finish("lowrank", *HIGH)
    before, units = folder.artifacts(), sorted(folder.root.glob(".units/lowrank@high_noise/*/unit.json"))
    file = folder.root / "artifacts/lowrank/high_noise/block_01/factors.safetensors"
    if how == "missing":
        file.unlink()
    else:
        in_place_of(file, file.read_bytes()[:5000])
    message = refused("gptq", *HIGH)
    assert message.startswith("artifacts/lowrank/high_noise/block_01/factors.safetensors: missing or damaged (")
    assert message.endswith("); remove artifacts/lowrank/high_noise and run its stage again")
    shutil.rmtree(folder.root / "artifacts/lowrank/high_noise")
    times = [unit.stat().st_mtime_ns for unit in units]
    folder.finish("lowrank", *HIGH)
    assert folder.artifacts().items() >= before.items()
    assert [unit.stat().st_mtime_ns for unit in units] == times


def test_a_missing_chunk_of_the_activations(folder, refused):
    """Zarr would read zeros. Units of capture are whole, and bring it back."""
    chunk = folder.root / "artifacts/activations/high_noise.zarr/block_00/attn2.q/channels/c/0/0"
    whole = chunk.read_bytes()
    chunk.unlink()
    message = refused("lowrank", *HIGH)
    assert "attn2.q/channels: 0 of 1 chunks are there; remove the folder and run its stage again" in message
    folder.finish("capture", *HIGH)
    assert chunk.read_bytes() == whole


def test_a_truncated_unit_is_made_again(folder):
    """The outputs of a shard of calls, which only the next block reads, are cut short between two runs."""
    before = folder.artifacts()
    shutil.rmtree(folder.root / ".units/capture@high_noise")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            capture,
            "add_up_shards",
            lambda shards, *rest: in_place_of(*shortened(shards["ffn.up"][0])) or 1 / 0,
        )
        assert isinstance(folder.run("capture", *HIGH).exception, ZeroDivisionError)
    folder.finish("capture", *HIGH)
    assert folder.artifacts() == before


def shortened(shard):
    """A file of a shard, and the first half of it."""
    file = next(shard.glob("hidden_states.*"))
    return file, file.read_bytes()[: file.stat().st_size // 2]
