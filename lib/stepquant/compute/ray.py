"""Workers on a Ray cluster: a running one, or one that is started on this machine for the time of the stage.

Ray places the tasks, assigns GPUs or fractions of them, and repeats tasks of lost workers. It sends the code along. All
data is read and written below the current folder, which every machine must have under the same path.
"""

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stepquant.compute.local import ATTEMPTS, lost_workers
from stepquant.compute.task import Outcome, Task, describe_worker, run_task
from stepquant.errors import UserError
from stepquant.params import Compute

# Results are files, so Ray's object store holds almost nothing. Ray refuses less than 75 MB.
OBJECT_STORE_BYTES = 100_000_000


class RayWorkers:
    """A connection to the cluster of `compute.address`."""

    def __init__(self, compute: Compute, code: Sequence[Path]):
        """Connect, or start a cluster.

        Args:
            compute: The parameters.
            code: Folders of the packages that Ray sends to the workers.

        Raises:
            UserError: Ray is not installed, nothing answers, or no machine has the resources of one unit.
        """
        if importlib.util.find_spec("ray") is None:
            raise UserError("compute.executor: ray is not installed here; pip install 'stepquant[ray]'")
        self.compute = compute
        _connect(compute, code)
        try:
            _check_resources(compute)
        except UserError:
            self.close()
            raise

    def describe(self) -> dict[str, str] | UserError:
        found: dict[str, str] | UserError = self._result(self._remote(describe_worker).remote(self.compute))
        return found

    def run(self, tasks: Sequence[Task], root: Path, versions: dict[str, str]) -> Iterator[Outcome]:
        import ray

        remote = self._remote(run_task_there)
        pending = [remote.remote(task, root, Path.cwd(), self.compute, versions) for task in tasks]
        while pending:
            (done, *_), pending = ray.wait(pending)
            yield self._result(done)

    def close(self) -> None:
        import ray

        ray.shutdown()

    def _remote(self, function: Callable[..., Any]) -> Any:
        """The function as a Ray task with the resources of one unit."""
        import ray

        return ray.remote(function).options(
            num_cpus=self.compute.threads, num_gpus=self.compute.gpus_per_unit, max_retries=ATTEMPTS - 1
        )

    def _result(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

        try:
            return ray.get(reference)
        except (WorkerCrashedError, NodeDiedError, OutOfMemoryError):
            raise UserError(lost_workers(ATTEMPTS)) from None


def run_task_there(task: Task, root: Path, folder: Path, compute: Compute, versions: dict[str, str]) -> Outcome:
    """run_task in a Ray worker, in the folder of the driver."""
    try:
        os.chdir(folder)
    except OSError as error:
        where = f"{folder}: not on the machine {os.uname().nodename} ({error.strerror})"
        missing = UserError(f"{where}; share it with all machines under the same path")
        return Outcome(task.key, missing, "")
    return run_task(task, root, compute, versions)


def _connect(compute: Compute, code: Sequence[Path]) -> None:
    import ray

    if compute.address:
        _check_address(compute.address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    own = {
        "num_cpus": compute.workers * compute.threads,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    travels = {"py_modules": [os.fspath(folder) for folder in code], "excludes": ["__pycache__"]}
    try:
        ray.init(
            address=compute.address or "local",
            runtime_env=travels,
            log_to_driver=False,
            logging_level="ERROR",
            **({} if compute.address else own),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "with token authentication, every machine needs RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN"
        raise UserError(
            f"compute.address: no Ray cluster at {compute.address}: {' '.join(str(error).split())}; {hint}"
        ) from None


def _check_address(address: str) -> None:
    """Refuse an address where nothing listens: Ray would retry for many minutes."""
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"compute.address: nothing answers at {address} ({error}); "
            "expected the address that `ray start --head` prints"
        ) from None


def _check_resources(compute: Compute) -> None:
    """Refuse what no machine of the cluster has: Ray would wait for it forever."""
    import ray

    if compute.gpus_per_unit == 0 and compute.device.startswith("cuda"):
        raise UserError(
            "compute.gpus_per_unit: 0 hides all GPUs from Ray's workers, and compute.device is cuda; "
            "set 1, or a fraction of a GPU"
        )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, key, wanted in (("CPU", "threads", compute.threads), ("GPU", "gpus_per_unit", compute.gpus_per_unit)):
        most = max(node.get(name, 0) for node in nodes)
        if wanted > most:
            raise UserError(
                f"compute.{key}: a unit asks for {wanted:g} {name}s; "
                f"the largest machine of the Ray cluster has {most:g}"
            )
