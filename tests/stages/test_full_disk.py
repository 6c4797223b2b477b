"""A refusal of the disk in a real stage: exit code 2, one message that says where, and nothing half-written.

What a stage can do without (hard links, locks) is no refusal.
"""

import errno
import fcntl
import re
import shutil

import pytest
from safetensors import SafetensorError

from stages import _blocks
from tests.stages.conftest import HIGH

AGAIN = "then run the same command again"
FULL = f"No space left on device; free space, {AGAIN}"
READ_ONLY = f"Read-only file system; make the folder writable, {AGAIN}"


def redo(folder, stage):
    """Forget a stage's finished units, so that it has to write them again."""
    shutil.rmtree(folder.root / ".units" / stage)


def test_a_full_disk_while_a_small_file_is_written(refused, disk):
    disk.refuse(errno.ENOSPC, "artifacts/model/.manifest.json.tmp")
    assert refused("model") == f"artifacts/model/.manifest.json.tmp: {FULL}"


@pytest.mark.parametrize(
    ("stage", "arguments", "label", "array"),
    [
        ("trajectories", (), "trajectories", "encoder_hidden_states"),
        ("capture", HIGH, "capture@high_noise", "attn2.q/channels"),
    ],
)
def test_a_full_disk_while_a_zarr_group_is_written(folder, refused, disk, stage, arguments, label, array):
    """Some arrays fit, this one does not."""
    redo(folder, label)
    before = folder.artifacts()
    disk.refuse(errno.ENOSPC, f".units/{label}/*.partial/{array}/c/*")
    assert "No space left on device; free space" in refused(stage, *arguments)
    disk.allow()
    folder.finish(stage, *arguments)
    assert folder.artifacts() == before


def test_a_full_disk_while_factors_are_written(folder, refused, monkeypatch):
    def full(tensors, path):
        # What safetensors raises on a full tmpfs; it has no errno.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(_blocks, "save_file", full)
    assert refused("lowrank", *HIGH) == f"a file below {folder.root}: {FULL}"


def test_a_full_disk_while_units_are_gathered(folder, refused, disk):
    """Neither links nor copies fit: the finished out stays, the units stay, and the same command ends well later."""
    before = folder.artifacts()
    disk.refuse(errno.ENOSPC, "artifacts/activations/*", ("os.link", "open"))
    assert "No space left on device" in refused("capture", *HIGH)
    disk.allow()
    folder.finish("capture", *HIGH)
    assert folder.artifacts() == before


def test_a_full_disk_while_a_checkpoint_is_written(refused, disk):
    disk.refuse(errno.ENOSPC, "artifacts/checkpoints/*/vae/*", ("open",))
    assert "No space left on device" in refused("pack", "--variant", "rtn")


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("model", ()),
        ("trajectories", ()),
        ("capture", HIGH),
        ("lowrank", HIGH),
        ("pack", ("--variant", "rtn")),
        ("generate", ("--variant", "bf16")),
    ],
)
def test_a_read_only_artifacts_folder(refused, disk, stage, arguments):
    disk.refuse(errno.EROFS, "artifacts*")
    message = refused(stage, *arguments)
    assert re.match(r"(\S*/)?artifacts/", message) and message.endswith(f": {READ_ONLY}")


def test_a_finished_checkpoint_on_a_read_only_disk(folder, refused, disk):
    folder.finish("pack", "--variant", "rtn")
    disk.refuse(errno.EROFS, "artifacts*")
    assert refused("pack", "--variant", "rtn") == f"artifacts/checkpoints/rtn: {READ_ONLY}"


def test_a_stage_on_a_disk_without_hard_links_and_locks(folder, disk, monkeypatch):
    """It copies and warns; its bytes are those of any other disk."""

    def unable(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    before = folder.artifacts()
    disk.refuse(errno.EPERM, "artifacts/*", ("os.link",))
    monkeypatch.setattr(fcntl, "flock", unable)
    result = folder.run("capture", *HIGH)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stderr.count("files are copied, not hardlinked (Operation not permitted)") == 1
    assert result.stderr.count("this disk has no locks (No locks available)") == 1
    disk.allow()
    assert folder.artifacts() == before
