"""The pipeline as trajectories and generate sample with it: loaded quietly, with the scheduler that the params ask for."""

from collections.abc import Callable
from typing import Any

from stages.common import dtype_of, quiet_libraries
from stepquant.models.sampling import set_flow_shift
from stepquant.models.source import load_source_pipeline, resolve_source
from stepquant.params import Compute, Sampling


def source_pipeline(manifest: dict[str, Any], compute: Compute, sampling: Sampling) -> Any:
    """The unquantized pipeline of the manifest."""
    folder = resolve_source(manifest["source"], manifest["revision"])
    return ready_to_sample(lambda: load_source_pipeline(folder, compute.device, dtype_of(compute.dtype)), sampling)


def ready_to_sample(load: Callable[[], Any], sampling: Sampling) -> Any:
    """What `load` gives, without the bars and advice of its libraries, and with the timestep shift of the params."""
    quiet_libraries()
    pipe = load()
    set_flow_shift(pipe, sampling.flow_shift)
    return pipe
