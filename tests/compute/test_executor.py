"""The same units from every executor, whatever happens to its workers."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from stepquant.command_runner import user_error
from stepquant.compute import executor
from stepquant.compute.executor import Executor
from stepquant.compute.progress import meter
from stepquant.compute.task import Task
from stepquant.compute.units import UnitStore
from stepquant.errors import OutOfMemory, UserError
from stepquant.params import Compute
from stepquant.torch_setup import numerics_versions
from tests.compute import work

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = [ROOT / "lib/stepquant", ROOT / "tests"]
LOCAL = {"offload": "none", "executor": "local", "workers": 1, "address": None, "gpus_per_unit": 0.0}
SPAWNED = pytest.mark.parametrize("kind", ["local", "ray"])
ALL = pytest.mark.parametrize("kind", ["in process", "local", "ray"])


@pytest.fixture
def compute(request):
    """compute(kind, **changes): the params of an executor; Ray's joins the cluster of the test session."""

    def make(kind, **changes):
        own = {"in process": {}, "local": {"workers": 2}, "ray": {"executor": "ray", "workers": 2}}[kind]
        if kind == "ray" and "address" not in changes:
            own["address"] = request.getfixturevalue("ray_cluster")
        return Compute(**({"device": "cpu", "dtype": "float32", "threads": 1} | LOCAL | own | changes))

    return make


@pytest.fixture
def store(tmp_path):
    return UnitStore(tmp_path / "units")


def map_units(executor, store, works):
    """One unit per work, its key the position."""
    tasks = [Task(str(i), function) for i, function in enumerate(works)]
    with meter("test", len(tasks)) as progress:
        return executor.map_units(store, tasks, progress)


def map_alone(compute, store, works):
    """The same in an executor of its own."""
    with Executor(compute, CODE) as workers:
        return map_units(workers, store, works)


@ALL
def test_units_warnings_and_progress_arrive(compute, store, capsys, kind):
    units = map_alone(compute(kind), store, [work.Write("a", "mind this"), work.Write("b"), work.describe_process])
    assert [unit.folder for unit in units] == [store.root / key for key in "012"]
    assert [unit.digest for unit in units] == [store.find(key).digest for key in "012"]
    assert [(store.root / key / "text").read_text() for key in "01"] == ["a", "b"]
    assert ((store.root / "2" / "pid").read_text() == str(os.getpid())) == (kind == "in process")
    assert (store.root / "2" / "threads").read_text() == "1"
    assert ("py_modules" in (store.root / "2" / "code").read_text()) == (kind == "ray")  # the code has travelled
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("mind this") == 1
    assert [line.split(",")[0] for line in lines if line.startswith("test: ")] == [
        "test: 1/3",
        "test: 2/3",
        "test: 3/3",
    ]


@ALL
def test_finished_units_are_not_made_again_and_nothing_is_started_for_them(compute, store, capsys, kind):
    for key in "01":
        store.make(key, work.Write("old"))
    inodes = [os.stat(store.root / key / "text").st_ino for key in "01"]
    map_alone(compute(kind, address="nowhere:1"), store, [work.bug, work.bug])
    assert [os.stat(store.root / key / "text").st_ino for key in "01"] == inodes
    assert capsys.readouterr().err == "test: 2/2, finished earlier\n"


@SPAWNED
def test_killed_workers(compute, store, tmp_path, kind):
    """Units that kill their worker once are made by another, and change nothing; one that always does is given up."""
    works = [work.Write("a"), *(work.Write(text, kill_once=tmp_path / f"killed {text}") for text in "bc")]
    with Executor(compute(kind), CODE) as workers:
        units = map_units(workers, store, works)
        assert all((tmp_path / f"killed {text}").exists() for text in "bc")
        undisturbed = UnitStore(tmp_path / "undisturbed")
        assert [unit.digest for unit in units] == [undisturbed.make(text, work.Write(text)).digest for text in "abc"]
        with pytest.raises(UserError, match="workers died 3 times in a row without finishing a unit"):
            map_units(workers, store, [*works, work.die])
    assert store.find("2") and not store.find("3")


@ALL
def test_errors(compute, store, capsys, kind):
    """What the user can fix is the same message everywhere; our bugs keep their type and their place in the worker."""
    with Executor(compute(kind), CODE) as workers:
        with pytest.raises(UserError) as mistake:
            map_units(workers, store, [work.mistake])
        assert str(mistake.value) == "key: found this; allowed: that"
        assert "a warning before it\n" in capsys.readouterr().err
        with pytest.raises((UserError, OSError)) as refusal:
            map_units(workers, store, [work.full_disk])
        assert str(user_error(refusal.value)).startswith("artifacts/out: No space left on device; free space")
        with pytest.raises((OutOfMemory, torch.OutOfMemoryError)) as shortage:
            map_units(workers, store, [work.out_of_memory])
        found = user_error(shortage.value)
        assert isinstance(found, OutOfMemory) and str(found) == (
            "out of memory on compute.device: CUDA out of memory. Tried to allocate 2.00 GiB. "
            "GPU 0 has a total capacity of 79.11 GiB of which 1.60 GiB is free"
        )
        with pytest.raises(ZeroDivisionError) as bug:
            map_units(workers, store, [work.bug])
        assert "work.py" in str(bug.value.__cause__) + str(bug.value) + str(bug.traceback[-1].path)
    assert store.find("0") is None


@SPAWNED
def test_the_workers_own_the_device(compute, store, monkeypatch, kind):
    """This process does not touch it: it may have none. `meta` is a device that every torch has.

    A worker that would make other bytes, as another model of GPU does, is refused.
    """
    monkeypatch.setattr(executor, "prepare_torch", lambda compute: 1 / 0)
    with Executor(compute(kind, device="meta"), CODE) as workers:
        assert workers.versions == numerics_versions("meta")
        assert [unit.digest for unit in map_units(workers, store, [work.Write("a")])] == [store.find("0").digest]
        workers.__dict__["versions"] = numerics_versions("meta") | {"gpu": "NVIDIA H100"}
        with pytest.raises(UserError, match="gpu: None in a worker on .*, and NVIDIA H100 in the keys") as refused:
            map_units(workers, store, [work.Write("a"), work.Write("b")])
    assert str(refused.value).endswith("use workers with the same packages and the same model of GPU")
    assert store.find("1") is None


@SPAWNED
def test_a_device_that_the_workers_cannot_use(compute, kind):
    """Ray refuses cuda before: a unit asks for no GPU here."""
    device = {"local": "cuda:99", "ray": "xpu"}[kind]
    with (
        Executor(compute(kind, device=device), CODE) as workers,
        pytest.raises(UserError, match=f"compute.device: '{device}' cannot be used here: "),
    ):
        workers.versions


@SPAWNED
def test_a_name_that_is_no_device_starts_no_worker(compute, monkeypatch, kind):
    monkeypatch.setattr(Executor, "_engine", property(lambda self: 1 / 0))
    with pytest.raises(UserError, match="compute.device: 'abacus' cannot be used here: "):
        Executor(compute(kind, device="abacus"), CODE).versions


def test_a_share_of_a_gpu_that_is_not_there_is_refused(compute, store):
    with pytest.raises(UserError) as refused:
        map_alone(compute("ray", gpus_per_unit=0.5), store, [work.Write("a")])
    assert (
        str(refused.value)
        == "compute.gpus_per_unit: a unit asks for 0.5 GPUs; the largest machine of the Ray cluster has 0"
    )


def test_more_threads_than_a_machine_has_are_refused(compute, store):
    with pytest.raises(
        UserError, match="compute.threads: a unit asks for 3 CPUs; the largest machine of the Ray cluster has 2"
    ):
        map_alone(compute("ray").model_copy(update={"threads": 3}), store, [work.Write("a")])


def test_an_address_where_nobody_listens_is_refused_at_once(compute, store, ray_cluster):
    with pytest.raises(UserError, match="compute.address: nothing answers at localhost:1 "):
        map_alone(compute("ray", address="localhost:1"), store, [work.Write("a")])


def test_without_ray_the_message_says_what_to_install(compute, store, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        map_alone(compute("ray", address=None), store, [work.Write("a")])
    assert str(refused.value) == "compute.executor: ray is not installed here; pip install 'stepquant[ray]'"


def test_a_folder_that_a_machine_does_not_have_is_named(tmp_path, store):
    from stepquant.compute.ray import run_task_there

    outcome = run_task_there(Task("0", work.Write("a")), store.root, tmp_path / "absent", None, {})
    message = str(outcome.result)
    assert message.startswith(f"{tmp_path / 'absent'}: not on the machine ")
    assert message.endswith("under the same path")


DRIVER = """
import sys
from pathlib import Path
from tests.compute.test_executor import LOCAL, Compute, UnitStore, map_alone, work

if __name__ == "__main__":
    compute = Compute(device="cpu", dtype="float32", threads=1, **(LOCAL | {"workers": 2}))
    map_alone(compute, UnitStore(Path(sys.argv[1])), [work.Endless(Path(sys.argv[1]) / f"pid {i}") for i in range(2)])
"""


def test_spawned_workers_die_with_their_killed_driver(store):
    files = [store.root / f"pid {i}" for i in range(2)]
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(store.root)], cwd=ROOT) as driver:
        wait_for(lambda: driver.poll() is not None or all(file.exists() and file.read_text() for file in files))
        assert driver.poll() is None
        workers = [psutil.Process(int(file.read_text())) for file in files]
        driver.kill()
    wait_for(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers))


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
