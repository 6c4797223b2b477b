"""SIGKILL in the middle of a stage, and two writers at once: nothing is lost, nothing is stale, nothing is broken."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.workspace import BLOCKS, LONGEST, ROOT, Workspace

EXPERT = "high_noise"
OUT = f"artifacts/residual/{EXPERT}"
DEADLINE = 120  # seconds until a process that hangs fails its test


@pytest.fixture
def fresh(workspace_copy) -> Workspace:
    """A finished workspace without units and without DVC's cache of outs, so that whatever runs has to compute."""
    for folder in (".units", ".dvc/cache"):
        subprocess.run(["rm", "-r", workspace_copy.root / folder], check=True)
    return workspace_copy


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def finished(workspace: Workspace) -> dict[str, tuple[int, int]]:
    """The finished blocks of gptq by key, with inode and time of each marker: a unit made again has others."""
    markers = (workspace.root / ".units" / f"gptq@{EXPERT}").glob("[!.]*/unit.json")
    return {m.parent.name: (m.stat().st_ino, m.stat().st_mtime_ns) for m in markers}


def stage_process(parent: subprocess.Popen) -> psutil.Process | None:
    """The stage's Python process: the one started, or the one that dvc started; None if it has not begun."""
    try:
        processes = (psutil.Process(parent.pid), *psutil.Process(parent.pid).children(recursive=True))
        return next((p for p in processes if p.cmdline()[1:2] == ["-m"] and p.cmdline()[2].startswith("stages.")), None)
    except psutil.NoSuchProcess:  # one of them ended while we looked
        return None


@contextmanager
def stopped_after_one_block(workspace: Workspace, *command: str) -> Iterator[tuple[subprocess.Popen, psutil.Process]]:
    """Start a command that runs gptq, and stop its process when its first block is done; leaves nothing running."""
    parent, process = workspace.start(*command), None
    try:
        wait_for(lambda: stage_process(parent) is not None or parent.poll() is not None)
        assert parent.poll() is None, parent.stdout.read()
        process = stage_process(parent)
        process.nice(19)  # so that this test sees the first block before the second is done, on a busy machine too
        wait_for(lambda: bool(finished(workspace)) or parent.poll() is not None)
        assert parent.poll() is None, parent.stdout.read()
        process.suspend()
        assert len(finished(workspace)) < BLOCKS, "the stage was quicker than its test"
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


CHAIN = {
    "capture": (f"capture@{EXPERT}", f"artifacts/activations/{EXPERT}.zarr"),
    "lowrank": (f"lowrank@{EXPERT}", f"artifacts/lowrank/{EXPERT}"),
    "gptq": (f"gptq@{EXPERT}", f"artifacts/residual/{EXPERT}"),
    "clip": (f"clip@{EXPERT}", f"artifacts/clip/{EXPERT}"),
    "sensitivity": (f"sensitivity@{EXPERT}", f"artifacts/sensitivity/{EXPERT}"),
    "pack": ("pack@full", "artifacts/checkpoints/full"),
}


def test_stages_killed_at_random_moments(workspace, tmp_path):
    """Four SIGKILLs for each stage of CHAIN: no unit is made twice, and no out changes.

    Two processes kill, each in a folder of its own (tests/pipeline/killed.py).
    """
    killers = []
    for seed, stages in enumerate((("capture", "clip", "sensitivity", "pack"), ("lowrank", "gptq"))):
        folder, calls = tmp_path / str(seed), tmp_path / f"{seed}.json"
        folder.mkdir()
        for name in ("artifacts", "data", "params.yaml"):
            subprocess.run(["cp", "-al", workspace.root / name, folder / name], check=True)
        named = {stage: CHAIN[stage][0].split("@")[1] for stage in stages}
        commands = {
            stage: [f"stages.{stage}", "--variant" if stage == "pack" else "--expert", name]
            for stage, name in named.items()
        }
        calls.write_text(
            json.dumps(
                {stage: {"folder": str(folder), "command": commands[stage], "out": CHAIN[stage][1]} for stage in stages}
            )
        )
        environment = workspace.environment | {
            "PYTHONPATH": os.pathsep.join([str(workspace.root / "lib"), str(workspace.root)])
        }
        command = [sys.executable, ROOT / "tests/pipeline/killed.py", "4", str(seed), calls]
        killers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    counts = {}
    for killer in killers:
        output = killer.communicate(timeout=LONGEST)[0]
        assert killer.returncode == 0
        counts |= json.loads(output)
    assert set(counts) == set(CHAIN) and all(len(found) == 5 for found in counts.values())
    assert any(found[i] for found in counts.values() for i in range(4)), (
        "every kill came before the first unit was finished"
    )
    assert [counts[stage][-1] for stage in ("lowrank", "gptq", "clip", "pack")] == [BLOCKS, BLOCKS, BLOCKS, 0]


@pytest.mark.parametrize("stage", ["gptq", "pack"])
def test_a_killed_dvc_takes_its_stage_along_and_the_next_one_ends_like_an_undisturbed_run(fresh, stage):
    """Packing at a random moment of its start, and gptq after its first block; other stages work in units as gptq does
    (above), or in none as packing does. Only before the first line of Python is a stage
    unprotected."""
    expected, (target, out) = fresh.hashes(), CHAIN[stage]
    dvc = fresh.start("dvc", "repro", "--force", "--single-item", target)
    try:
        wait_for(lambda: dvc.poll() is not None or busy(stage_process(dvc)))
        assert dvc.poll() is None, dvc.stdout.read()
        process = stage_process(dvc)
        time.sleep(random.Random(stage).uniform(0, 1.5))
        wait_for(lambda: stage != "gptq" or dvc.poll() is not None or bool(finished(fresh)))
        assert dvc.poll() is None, "the stage was quicker than its test"
    finally:
        dvc.kill()
        dvc.communicate(timeout=DEADLINE)
    wait_for(lambda: gone(process))
    fresh.run("dvc", "repro", "--single-item", target)
    assert fresh.hashes() == expected
    assert not list((fresh.root / ".units").rglob("*.partial")) and not list((fresh.root / out).parent.glob(".*"))


def busy(process: psutil.Process | None) -> bool:
    """Whether a process has come to run code of its own."""
    try:
        return process is not None and process.cpu_times().user > 0.2
    except psutil.NoSuchProcess:
        return False


def test_a_stage_killed_by_hand_goes_on_by_hand(fresh):
    expected = fresh.hashes()[f"gptq@{EXPERT}: {OUT}"]
    command = ("stages.gptq", "--expert", EXPERT)
    subprocess.run(["rm", "-r", fresh.root / OUT], check=True)
    with stopped_after_one_block(fresh, *command) as (_, process):
        process.kill()
    before = finished(fresh)
    fresh.run(*command)
    assert before.items() <= finished(fresh).items()
    fresh.run("dvc", "commit", "--force", f"gptq@{EXPERT}")
    assert fresh.hashes()[f"gptq@{EXPERT}: {OUT}"] == expected


def test_a_parameter_changed_after_a_kill_reuses_nothing(fresh):
    target = ("dvc", "repro", "--single-item", f"gptq@{EXPERT}")
    name = f"gptq@{EXPERT}: {OUT}"
    first = fresh.hashes()[name]
    with stopped_after_one_block(fresh, *target, "--force") as (_, process):
        process.kill()
    before = finished(fresh)

    dampings = fresh.params()["gptq"]["dampings"]
    fresh.set("gptq.dampings", [0.5])
    fresh.run(*target)
    changed, after = fresh.hashes()[name], finished(fresh)
    assert changed != first
    assert len(after.keys() - before.keys()) == BLOCKS

    fresh.set("gptq.dampings", dampings)
    fresh.run(*target)
    assert fresh.hashes()[name] == first
    fresh.run("stepquant.cli", "gc", "--keep-days", "0")
    assert len(finished(fresh)) == BLOCKS  # those of this artifact; DVC does without the others
    fresh.set("gptq.dampings", [0.5])
    output = fresh.run(*target)
    assert "is cached - skipping run" in output
    assert fresh.hashes()[name] == changed


def test_a_second_writer_is_refused(fresh):
    """During a run (its stage is stopped while the others try), a stage and a `dvc repro` are both refused."""
    expected = fresh.hashes()
    with stopped_after_one_block(fresh, "dvc", "repro", "--force", "--single-item", f"gptq@{EXPERT}") as (dvc, process):
        by_hand = fresh.run("stages.gptq", "--expert", EXPERT, code=2)
        assert (
            by_hand
            == f"error: .units/gptq@{EXPERT}.lock: another process is running this stage; wait for it or stop it\n"
        )
        by_dvc = fresh.run("dvc", "repro", f"gptq@{EXPERT}", code=255)
        assert "is busy, it is being blocked by" in by_dvc
        process.resume()
        assert dvc.wait(DEADLINE) == 0
    assert fresh.hashes() == expected
    assert tuple(fresh.root.glob("artifacts/residual/.*")) == ()


def test_what_a_killed_process_left_is_cleared_away(fresh):
    folder = fresh.root / f".units/gptq@{EXPERT}"
    out = fresh.root / OUT
    partial_unit, partial_out = folder / ".0123.4567.partial", out.with_name(f".{out.name}.tmp")
    for leftover in (partial_unit, partial_out):
        leftover.mkdir(parents=True)
        (leftover / "half.safetensors").touch()
    folder.with_name(f"{folder.name}.lock").touch()
    fresh.run("stages.gptq", "--expert", EXPERT)
    assert len(finished(fresh)) == BLOCKS
    assert not partial_unit.exists()
    assert not partial_out.exists()
