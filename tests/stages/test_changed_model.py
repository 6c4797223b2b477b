"""A source model that changes behind the back of DVC, after stage model described it."""

import os

import pytest
from safetensors.torch import load_file, save_file

from tests.stages.conftest import HIGH, TINY_MODEL, WEIGHTS


@pytest.fixture
def weights(folder):
    """The weights of the first expert, in a file of this test alone."""
    file = folder.root / TINY_MODEL / "transformer" / WEIGHTS
    content = file.read_bytes()
    file.unlink()  # a hard link to that of other tests
    file.write_bytes(content)
    return file


def scaled(file):
    tensors = load_file(file)
    tensors["blocks.1.ffn.net.2.weight"] *= 2
    return tensors


@pytest.mark.parametrize("stage", ["lowrank", "capture"])
def test_other_weights_in_the_same_file_are_refused(folder, refused, weights, stage):
    old = weights.stat()
    save_file(scaled(weights), weights)
    os.utime(weights, ns=(old.st_atime_ns, old.st_mtime_ns))  # as a copy that keeps times
    assert refused(stage, *HIGH) == (
        f"{os.path.relpath(weights)}: changed since stage model described it; "
        "run `dvc repro --force model`, or put the file back"
    )


def test_a_link_to_another_model_is_refused(folder, refused, weights, tmp_path):
    other = tmp_path / "other"
    weights.parent.rename(other)
    weights.parent.symlink_to(other)
    folder.finish("lowrank", *HIGH)  # the same files behind a link
    save_file(scaled(weights), tmp_path / "scaled.safetensors")
    newer = tmp_path / "newer"
    newer.mkdir()
    for file in other.iterdir():
        os.link(file if file.name != WEIGHTS else tmp_path / "scaled.safetensors", newer / file.name)
    weights.parent.unlink()
    weights.parent.symlink_to(newer)
    assert "changed since stage model described it" in refused("gptq", *HIGH)


def test_the_same_weights_written_again_are_the_same_model(folder, weights):
    weights.write_bytes(weights.read_bytes())
    folder.finish("lowrank", *HIGH)


def test_a_model_that_was_described_again_is_another(folder, weights):
    save_file(scaled(weights), weights)
    folder.finish("model")
    folder.finish("lowrank", *HIGH)
