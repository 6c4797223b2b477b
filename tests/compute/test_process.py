import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from stepquant.compute.process import exclusive
from stepquant.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from stepquant.compute.process import exclusive

with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock until it is told to end."""
    lock = tmp_path / "new" / "stage.lock"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield lock, process
        process.kill()


def test_a_second_process_is_refused_until_the_first_has_ended(holder):
    lock, process = holder
    with pytest.raises(UserError, match="stage.lock: another process is running this stage"), exclusive(lock):
        pass
    process.communicate("end\n")
    assert process.returncode == 0
    with exclusive(lock):
        assert lock.exists()


def test_a_killed_holder_leaves_no_lock(holder):
    lock, process = holder
    process.kill()
    process.wait()
    with exclusive(lock):
        assert lock.exists()


def test_a_failure_inside_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock"):
        raise ZeroDivisionError
    with exclusive(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_without_locks(tmp_path, monkeypatch, capsys, number):
    def unable(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unable)
    lock, entered = tmp_path / "stage.lock", False
    with exclusive(lock):
        entered = True
    assert entered
    reason = os.strerror(number)
    assert capsys.readouterr().err == (
        f"warning: {lock}: this disk has no locks ({reason}); do not run a stage twice at a time\n"
    )


def test_another_error_of_a_lock_names_its_file(tmp_path, monkeypatch):
    def broken(handle, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error: '.*/stage.lock'"), exclusive(tmp_path / "stage.lock"):
        pass


STAGE = """
import time
from stepquant.compute.process import die_with_parent

die_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
# Like DVC: starts a stage and waits for it. What it prints is the stage's process id, then what the stage prints.
PARENT = """
import subprocess, sys
stage = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(stage.pid, flush=True)
stage.wait()
"""


def wait_for_end(pid, seconds):
    """Whether the process ended (or is a zombie that nobody has collected) within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with open(f"/proc/{pid}/stat") as file:
                state = file.read().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_stage_dies_with_its_killed_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT, STAGE], stdout=subprocess.PIPE, text=True) as parent:
        stage = int(parent.stdout.readline())
        try:
            assert parent.stdout.readline() == "ready\n"
            parent.send_signal(signal.SIGKILL)
            assert wait_for_end(stage, seconds=30)
        finally:
            if not wait_for_end(stage, seconds=0.1):
                os.kill(stage, signal.SIGKILL)
