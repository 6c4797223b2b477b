import errno
import shutil
import subprocess
import sys

import pytest
import torch
import typer
from safetensors import SafetensorError
from typer.testing import CliRunner

from stepquant.command_runner import command
from stepquant.errors import OutOfMemory, UserError


def invoke(function, *arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command(function))
    return CliRunner().invoke(app, arguments)


def raising(error):
    def function() -> None:
        raise error

    return function


def test_a_command_that_ends_well_is_silent_about_errors():
    def greet(name: str, times: int = 1) -> None:
        """Say hello."""
        print(f"hello {name} " * times)

    result = invoke(greet, "world", "--times", "2")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "hello world hello world \n", "")
    assert "Say hello." in invoke(greet, "--help").stdout


def test_a_user_s_mistake_is_one_message_and_exit_code_2():
    result = invoke(raising(UserError("params.yaml: rank: found -1; allowed: 0 or more")))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: params.yaml: rank: found -1; allowed: 0 or more\n"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EROFS, "make the folder writable"),
        (errno.EACCES, "make the folder writable"),
        (errno.EPERM, "make the folder writable"),
        (errno.ENOTSUP, "work in a folder on another disk"),
        (errno.ENOSYS, "work in a folder on another disk"),
    ],
)
def test_what_the_file_system_refuses_is_the_user_s_to_fix(number, remedy):
    result = invoke(raising(OSError(number, "refused", "artifacts/model")))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: artifacts/model: ") and result.stderr.count("\n") == 1
    assert remedy in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # As safetensors 0.8 words it, seen on a full tmpfs.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        # As shutil.copytree collects what went wrong.
        shutil.Error([("a", "b", str(OSError(errno.ENOSPC, "No space left on device", "b")))]),
    ],
    ids=["write", "safetensors", "copytree"],
)
def test_a_full_disk_that_names_no_file_names_the_folder(error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(raising(error))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: a file below {tmp_path}: No space left on device; ")


SHORTAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full. Of the allocated memory 76 GiB is in use"
FOUND = "out of memory on compute.device: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "capture",
            torch.OutOfMemoryError(SHORTAGE),
            f"{FOUND}; stage capture: lower capture.calls_per_chunk (device)",
        ),
        ("lowrank", torch.OutOfMemoryError(SHORTAGE), f"{FOUND}; stage lowrank: lower capture.search_tokens"),
        ("clip", OutOfMemory("cuda:0 is full"), "cuda:0 is full; stage clip: lower capture.search_tokens"),
        (
            "generate",
            MemoryError(),
            "out of memory on the host; stage generate: set compute.offload: group (device) or disk (device and host)",
        ),
        ("plan", torch.OutOfMemoryError(SHORTAGE), FOUND),
    ],
)
def test_a_device_that_is_full_is_the_user_s_to_fix(name, error, message):
    """The message says what was asked for, and which parameter of the stage to lower."""
    function = raising(error)
    function.__name__ = name
    result = invoke(function)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {message}")


def test_torch_is_not_imported_to_tell_its_errors_apart():
    program = (
        "import sys\n"
        "from stepquant.command_runner import user_error\n"
        "print(user_error(RuntimeError('x')), isinstance(user_error(MemoryError()), Exception), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "None True False\n", done.stderr


@pytest.mark.parametrize(
    "error", [ValueError("ours"), OSError(errno.EIO, "broken disk"), SafetensorError("header too small"), KeyError("x")]
)
def test_our_mistakes_keep_their_traceback(error):
    result = invoke(raising(error))
    assert result.exit_code == 1
    assert result.exception is error


def test_the_program_prints_to_stderr_and_exits_with_2():
    program = (
        "from stepquant.command_runner import command, main\n"
        "from stepquant.errors import UserError\n"
        "@command\n"
        "def fail() -> None:\n"
        "    raise UserError('what, where, allowed')\n"
        "main(fail)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: what, where, allowed\n")
