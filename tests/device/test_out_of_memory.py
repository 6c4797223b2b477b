"""A device that is too small for a stage: one message with the way out, and no half-written artifact."""

import pytest

from tests.device.runner import Call, run_stages

STAGES = [Call("capture", "high_noise"), Call("gptq", "high_noise"), Call("generate", "full")]


@pytest.mark.parametrize("call", STAGES, ids=str)
def test_the_message_names_the_remedy(workspace, tmp_path, call):
    result = run_stages(workspace, [call], "pretend:1", tmp_path / "run", limit=1_000_000)[call]
    assert not (tmp_path / "run" / str(call) / call.out).exists()
    last = result.error.splitlines()[-1]
    assert last.startswith("error: ") and "out of memory" in last and "compute.device" in last
    if call.stage == "capture":
        assert "capture.calls_per_chunk" in last
