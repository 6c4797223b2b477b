"""A device that is too small for a stage: one message with the way out, and no half-written artifact."""

from pathlib import Path

import pytest

from tests.device.runner import Call, Result, run_stages

STAGES = [Call("capture", "high_noise"), Call("gptq", "high_noise"), Call("generate", "full")]
LIMIT = 1_000_000  # bytes


@pytest.fixture(scope="module")
def too_small(workspace, tmp_path_factory) -> Path:
    """The folder in which the stages have run on a device of LIMIT bytes, in one process."""
    root = tmp_path_factory.mktemp("too_small")
    run_stages(workspace, STAGES, "pretend:1", root, limit=LIMIT)
    return root


@pytest.mark.parametrize("call", STAGES, ids=str)
def test_the_message_names_the_remedy(too_small, call):
    assert not (too_small / str(call) / call.out).exists()
    last = Result.read(too_small / str(call)).error.splitlines()[-1]
    assert last.startswith("error: ") and "out of memory" in last and "compute.device" in last
    if call.stage == "capture":
        assert "capture.calls_per_chunk" in last
