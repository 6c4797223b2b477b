"""How stage capture distributes its work."""

import shutil

import pytest

from stages import capture
from stepquant.compute.executor import Executor

HIGH = ("--expert", "high_noise")


@pytest.fixture
def sent(folder, monkeypatch):
    """The work of every task that is given to the executor, in a folder without finished units of capture."""
    shutil.rmtree(folder.root / ".units/capture@high_noise")
    works = []
    map_units = Executor.map_units

    def spying(self, store, tasks, progress):
        works.extend(task.work for task in tasks)
        return map_units(self, store, tasks, progress)

    monkeypatch.setattr(Executor, "map_units", spying)
    return works


def test_the_workers_merge_the_shards_of_each_block(folder, sent):
    """Failed before: the process that distributes the work merged them while the workers waited."""
    before = folder.artifacts()
    folder.finish("capture", *HIGH)
    assert [work.args[1] for work in sent if getattr(work, "func", None) is capture.add_up_shards] == [
        "block_00",
        "block_01",
    ]
    assert folder.artifacts() == before


def test_progress_counts_shards_only(folder, sent):
    """Two blocks, a range of blocks each, and one shard of the calls."""
    result = folder.run("capture", *HIGH)
    assert [line.split(",")[0] for line in result.stderr.splitlines()] == [
        "capture@high_noise: 1/2",
        "capture@high_noise: 2/2",
    ]
    again = folder.run("capture", *HIGH)
    assert [line for line in again.stderr.splitlines()] == [
        "capture@high_noise: 1/2, finished earlier",
        "capture@high_noise: 2/2, finished earlier",
    ]
