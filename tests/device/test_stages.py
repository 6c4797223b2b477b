"""Every stage that computes, again on the second pretend device: the bytes of the CPU, and bounded traffic."""

import hashlib
from pathlib import Path

import pytest

from tests.device.bounds import BOUNDS
from tests.device.runner import Call, Result, run_stages
from tests.once import once

PLACE = "pretend:1"
# These run the whole denoiser or the layers around its blocks, with weights that the CPU maps from their files.
MAPPED = [Call("trajectories", ""), Call("sensitivity", "high_noise")]


@pytest.fixture(scope="session")
def on_device(workspace, tmp_path_factory) -> Path:
    """The folder in which every stage of BOUNDS has run once more, each in a folder of its own."""
    return once(tmp_path_factory, "on_device", lambda root: run_stages(workspace, list(BOUNDS), PLACE, root))


@pytest.fixture(scope="module")
def from_copies(workspace, tmp_path_factory) -> Path:
    """These stages on the CPU with weights that are copies, as a device's are (`SafeOpen` says what changes)."""
    root = tmp_path_factory.mktemp("from_copies")
    assert [result.error for result in run_stages(workspace, MAPPED, "cpu", root).values()] == [None] * len(MAPPED)
    return root


def tree(path: Path) -> dict[str, str]:
    """SHA-256 of each file below a path (or of the file that it is), by relative path."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("call", BOUNDS, ids=str)
def test_the_bytes_of_the_cpu(on_device, workspace, request, call):
    result = Result.read(on_device / str(call))
    assert result.error is None, result.error
    here = request.getfixturevalue("from_copies") / str(call) if call in MAPPED else workspace.root
    assert tree(on_device / str(call) / call.out) == tree(here / call.out)


@pytest.mark.parametrize("call", BOUNDS, ids=str)
def test_no_more_traffic_than_allowed(on_device, call):
    result, bound = Result.read(on_device / str(call)), BOUNDS[call]
    assert result.per_unit.host_reads <= bound.host_reads
    assert result.per_unit.copies <= bound.copies
    assert result.per_unit.launches <= bound.launches


@pytest.mark.parametrize("call", BOUNDS, ids=str)
def test_nothing_lands_on_the_first_device(on_device, call):
    """Packing codes of GPTQ uses no device at all."""
    expected = set() if call == Call("pack", "full") else {PLACE.partition(":")[2]}
    assert Result.read(on_device / str(call)).peak.keys() == expected


def test_a_device_without_an_index_is_the_first(workspace, tmp_path):
    call = Call("clip", "high_noise")
    result = run_stages(workspace, [call], "pretend", tmp_path / "run")[call]
    assert result.error is None and result.peak.keys() == {"0"}
    assert tree(tmp_path / "run" / str(call) / call.out) == tree(workspace.root / call.out)


def test_a_device_that_is_not_there(workspace, tmp_path):
    call = Call("clip", "high_noise")
    error = run_stages(workspace, [call], "pretend:2", tmp_path / "run")[call].error
    assert error.startswith("error: compute.device: 'pretend:2' cannot be used here: ") and error.count("\n") == 1
