"""What each stage costs a device beside arithmetic: host reads, copies to it and kernel launches, per unit of work.

    python benchmarks/device_traffic.py                          on the tests' tiny workspace, which it first makes
    python benchmarks/device_traffic.py --workspace FOLDER       on one that is finished already
    python benchmarks/device_traffic.py --places 5               also the lines most host reads and copies come from

A host read is a value that the host waits for: the device's queue runs empty meanwhile. No GPU is needed, because the
device is the tests' pretend one (tests/pretend_device.py). A unit is what a stage's progress counts: a prompt, a shard
of calls or a block. The bounds are those that tests/device/test_stages.py holds the stages to.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.device.bounds import BOUNDS
from tests.device.runner import Call, Result, run_stages
from tests.workspace import Workspace, make_workspace

COLUMNS = {"host_reads": "host reads", "copies": "copies", "launches": "kernel launches"}


def finished_workspace(folder: Path) -> Workspace:
    """The tiny pipeline, run on the CPU from model to report: a minute or two."""
    workspace = make_workspace(folder)
    workspace.run("dvc", "repro")
    return workspace


def traffic_table(results: dict[Call, Result]) -> Table:
    table = Table(title="per unit of work: counted (bound)")
    table.add_column("stage")
    for name in ("units", *COLUMNS.values(), "peak MB"):
        table.add_column(name, justify="right")
    for call, result in results.items():
        counted, bound = result.per_unit, BOUNDS[call]
        cells = [f"{getattr(counted, name):,} ({getattr(bound, name):,})" for name in COLUMNS]
        table.add_row(str(call), str(result.units), *cells, f"{max(result.peak.values(), default=0) / 1e6:.1f}")
    return table


def print_places(call: Call, result: Result, count: int) -> None:
    """The lines from which most host reads and copies of one stage come, over all of its units."""
    for event, places in result.places.items():
        print(f"\n{call}: {COLUMNS[event]}")
        for place, times in list(places.items())[:count]:
            print(f"{times:8,}  {place}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, help="the folder of a finished tiny workspace")
    parser.add_argument("--device", default="pretend:1")
    parser.add_argument("--places", type=int, default=0, help="how many lines to name per stage")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.workspace
        workspace = Workspace(folder.resolve()) if folder else finished_workspace(Path(scratch) / "workspace")
        results = run_stages(workspace, list(BOUNDS), arguments.device, Path(scratch) / "run")
    for call, result in results.items():
        if result.error is not None:
            sys.exit(f"{call} failed on {arguments.device}:\n{result.error}")
    Console(width=120).print(traffic_table(results))
    for call, result in results.items() if arguments.places else ():
        print_places(call, result, arguments.places)


if __name__ == "__main__":
    main()
