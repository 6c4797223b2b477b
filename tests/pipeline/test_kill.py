"""SIGKILL in the middle of a stage, and two writers at once: nothing is lost, nothing is stale, nothing is broken."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.workspace import BLOCKS, Workspace

EXPERT = "high_noise"
OUTS = {"capture": f"artifacts/activations/{EXPERT}.zarr", "gptq": f"artifacts/residual/{EXPERT}"}
DEADLINE = 120  # seconds until a process that hangs fails its test


@pytest.fixture
def fresh(workspace_copy) -> Workspace:
    """A finished workspace without units and DVC's cache, which it would check outs out of: whatever runs has to compute."""
    for folder in (".units", ".dvc/cache"):
        subprocess.run(["rm", "-r", workspace_copy.root / folder], check=True)
    return workspace_copy


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def finished(workspace: Workspace, stage: str) -> dict[str, tuple[int, int]]:
    """The finished blocks of a stage by key, with inode and time of each marker: a unit made again has others.

    The outputs that capture hands from block to block are units too; they are left aside.
    """
    content = {"capture": "attn1.qkv", "gptq": "factors.safetensors"}[stage]
    units = (workspace.root / ".units" / f"{stage}@{EXPERT}").glob("[!.]*")
    markers = [unit / "unit.json" for unit in units if (unit / content).exists()]
    return {m.parent.name: (m.stat().st_ino, m.stat().st_mtime_ns) for m in markers}


def stage_process(parent: subprocess.Popen) -> psutil.Process | None:
    """The stage's Python process: the one started, or the one that dvc started; None if it has not begun."""
    try:
        processes = (psutil.Process(parent.pid), *psutil.Process(parent.pid).children(recursive=True))
        return next((p for p in processes if p.cmdline()[1:2] == ["-m"] and p.cmdline()[2].startswith("stages.")), None)
    except psutil.NoSuchProcess:  # one of them ended while we looked
        return None


@contextmanager
def stopped_after_one_block(workspace: Workspace, stage: str, *command: str) -> Iterator[tuple[subprocess.Popen, psutil.Process]]:
    """Start a command that runs a stage, and stop the stage's process when its first block is done; leaves nothing running."""
    parent, process = workspace.start(*command), None
    try:
        wait_for(lambda: stage_process(parent) is not None or parent.poll() is not None)
        assert parent.poll() is None, parent.stdout.read()
        process = stage_process(parent)
        process.nice(19)  # so that this test sees the first block before the second is done, on a busy machine too
        wait_for(lambda: bool(finished(workspace, stage)) or parent.poll() is not None)
        assert parent.poll() is None, parent.stdout.read()
        process.suspend()
        assert len(finished(workspace, stage)) < BLOCKS, "the stage was quicker than its test"
        yield parent, process
    finally:
        if parent.poll() is None:
            for leftover in [*psutil.Process(parent.pid).children(recursive=True), parent]:
                leftover.kill()
        elif process is not None and process.is_running():  # a stage that outlived its parent holds the pipe open
            process.kill()
        parent.communicate(timeout=DEADLINE)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("stage", OUTS)
@pytest.mark.parametrize("victim", ["the stage", "dvc"])
def test_a_killed_run_ends_like_an_undisturbed_one(fresh, stage, victim):
    expected = fresh.hashes()
    with stopped_after_one_block(fresh, stage, "dvc", "repro", "--force", "--single-item", f"{stage}@{EXPERT}") as (dvc, process):
        (dvc if victim == "dvc" else process).send_signal(signal.SIGKILL)
        wait_for(lambda: gone(process))
        dvc.wait(DEADLINE)
    before = finished(fresh, stage)
    assert 0 < len(before) < BLOCKS
    assert not (fresh.root / OUTS[stage]).exists()

    output = fresh.run("dvc", "repro", "--single-item", f"{stage}@{EXPERT}")
    assert f"Running stage '{stage}@{EXPERT}'" in output
    assert fresh.hashes() == expected
    after = finished(fresh, stage)
    assert len(after) == BLOCKS
    assert before.items() <= after.items()
    assert not list((fresh.root / ".units").rglob("*.partial"))


def test_a_stage_killed_by_hand_goes_on_by_hand(fresh):
    expected = fresh.hashes()[f"gptq@{EXPERT}: {OUTS['gptq']}"]
    command = ("stages.gptq", "--expert", EXPERT)
    subprocess.run(["rm", "-r", fresh.root / OUTS["gptq"]], check=True)
    with stopped_after_one_block(fresh, "gptq", *command) as (_, process):
        process.kill()
    before = finished(fresh, "gptq")
    fresh.run(*command)
    assert before.items() <= finished(fresh, "gptq").items()
    fresh.run("dvc", "commit", "--force", f"gptq@{EXPERT}")
    assert fresh.hashes()[f"gptq@{EXPERT}: {OUTS['gptq']}"] == expected


def test_a_parameter_changed_after_a_kill_reuses_nothing(fresh):
    target = ("dvc", "repro", "--single-item", f"gptq@{EXPERT}")
    name = f"gptq@{EXPERT}: {OUTS['gptq']}"
    first = fresh.hashes()[name]
    with stopped_after_one_block(fresh, "gptq", *target, "--force") as (_, process):
        process.kill()
    before = finished(fresh, "gptq")

    damping = fresh.params()["gptq"]["damping"]
    fresh.set("gptq.damping", 0.5)
    fresh.run(*target)
    changed, after = fresh.hashes()[name], finished(fresh, "gptq")
    assert changed != first
    assert len(after.keys() - before.keys()) == BLOCKS

    fresh.set("gptq.damping", damping)
    fresh.run(*target)
    assert fresh.hashes()[name] == first
    fresh.set("gptq.damping", 0.5)
    output = fresh.run(*target)
    assert "is cached - skipping run" in output
    assert fresh.hashes()[name] == changed


def test_a_second_writer_is_refused(fresh):
    """While a run is under way (its stage is stopped for as long as the others try), a stage and a `dvc repro` are both refused."""
    expected = fresh.hashes()
    with stopped_after_one_block(fresh, "gptq", "dvc", "repro", "--force", "--single-item", f"gptq@{EXPERT}") as (dvc, process):
        by_hand = fresh.run("stages.gptq", "--expert", EXPERT, code=2)
        assert by_hand == f"error: .units/gptq@{EXPERT}.lock: another process is running this stage; wait for it or stop it\n"
        by_dvc = fresh.run("dvc", "repro", f"gptq@{EXPERT}", code=255)
        assert "is busy, it is being blocked by" in by_dvc
        process.resume()
        assert dvc.wait(DEADLINE) == 0
    assert fresh.hashes() == expected
    assert tuple(fresh.root.glob("artifacts/residual/.*")) == ()


def test_what_a_killed_process_left_is_cleared_away(fresh):
    folder = fresh.root / f".units/gptq@{EXPERT}"
    out = fresh.root / OUTS["gptq"]
    partial_unit, partial_out = folder / ".0123.4567.partial", out.with_name(f".{out.name}.tmp")
    for leftover in (partial_unit, partial_out):
        leftover.mkdir(parents=True)
        (leftover / "half.safetensors").touch()
    folder.with_name(f"{folder.name}.lock").touch()
    fresh.run("stages.gptq", "--expert", EXPERT)
    assert len(finished(fresh, "gptq")) == BLOCKS
    assert not partial_unit.exists()
    assert not partial_out.exists()
