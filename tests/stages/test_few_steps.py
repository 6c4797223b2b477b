"""Few steps without guidance, as with Lightning: one call per step, and a bin for each."""

from pathlib import Path

from stepquant.calibration.trajectories import Trajectories
from stepquant.models.bins import Bins
from stepquant.storage.json_files import read_json
from tests.stages.conftest import HIGH

EDGES = {"high_noise": (1000, 968, 900), "low_noise": (900, 670, 0)}


def test_every_step_is_one_call_in_a_bin_of_its_own(folder):
    folder.set("sampling.steps", 4)
    folder.set("sampling.flow_shift", 5.0)
    for expert, edges in EDGES.items():
        folder.set(f"bins.{expert}", list(edges))
    folder.finish("trajectories")
    trajectories = Trajectories(Path("artifacts/trajectories.zarr"))
    for expert, edges in EDGES.items():
        calls = [call for call in trajectories.calls(expert) if call.prompt == "calibration_00"]
        assert [(call.branch, Bins(edges).index(call.t)) for call in calls] == [(0, 0), (0, 1)]
    folder.finish("capture", *HIGH)
    assert read_json(Path("artifacts/activations/high_noise.zarr/manifest.json"))["bin_edges"] == list(
        EDGES["high_noise"]
    )
