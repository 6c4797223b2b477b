"""A `python` that starts in no time: forks of one process that has imported torch and diffusers.

The workspace of the tests is made by `dvc repro`, which starts a process for each of 31 stages. Most of that time would
go into imports. Here a server imports what they need but stepquant and the stages, and `python -m MODULE ...` becomes a
small program that asks the server for a fork with its arguments, folder, environment and standard streams.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CLIENT = f"""#!{sys.executable} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect(os.environ["WARM_PYTHON"])
call = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(server, [json.dumps(call).encode()], [0, 1, 2])
code = server.recv(1)
sys.exit(code[0] if code else 1)  # without an answer, the fork was killed
"""
LARGEST_CALL = 1 << 18  # bytes of a call


@contextlib.contextmanager
def warm_python() -> Iterator[dict[str, str]]:
    """Changes to the environment under which `python -m MODULE ...` is such a fork."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        client, address = Path(folder, "python"), os.path.join(folder, "socket")
        client.write_text(CLIENT)
        client.chmod(0o700)
        quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
        server = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE, env=quiet)
        try:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            yield {"PATH": os.pathsep.join([folder, os.environ["PATH"]]), "WARM_PYTHON": address}
        finally:
            server.kill()
            server.wait()


def serve(address: str) -> None:
    """Fork for every call, until killed."""
    import accelerate  # noqa: F401
    import av  # noqa: F401
    import diffusers
    import matplotlib.figure  # noqa: F401
    import skimage.metrics  # noqa: F401
    import transformers
    import typer  # noqa: F401
    import zarr  # noqa: F401

    # Both libraries import a class when it is first used.
    for name in ("AutoencoderKLWan", "UniPCMultistepScheduler", "WanImageToVideoPipeline", "WanTransformer3DModel"):
        getattr(diffusers, name)
    for name in ("AutoTokenizer", "T5TokenizerFast", "UMT5EncoderModel"):
        getattr(transformers, name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(connection)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Run the module that a client asks for, and end this process."""
    content, streams, _, _ = socket.recv_fds(connection, LARGEST_CALL, 3)
    call, code = json.loads(content), 1
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    option, module, *arguments = call["arguments"]
    assert option == "-m"
    sys.argv = [module, *arguments]
    sys.path[0:1] = [call["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(bytes([code]))
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
