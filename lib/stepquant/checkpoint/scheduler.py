"""The timestep shift in a scheduler's config."""

import inspect
from typing import Any

from stepquant.errors import InvalidInput

# diffusers' multistep solvers have the first, its flow matching schedulers the second.
SHIFTS = ("flow_shift", "shift")


def with_flow_shift(config: dict[str, Any], flow_shift: float) -> dict[str, Any]:
    """A scheduler_config.json with another timestep shift.

    Args:
        config: content of the file.
        flow_shift: the shift, `sampling.flow_shift`.

    Raises:
        InvalidInput: the scheduler has no timestep shift.
    """
    keys = [key for key in SHIFTS if key in config] or _arguments(config.get("_class_name"))
    if not keys:
        raise InvalidInput(
            f"scheduler_config.json: {config.get('_class_name')} has no timestep shift, so sampling.flow_shift cannot "
            f"be written; expected a scheduler of diffusers with {' or '.join(SHIFTS)}"
        )
    return config | dict.fromkeys(keys, flow_shift)


def _arguments(class_name: Any) -> list[str]:
    """Which of SHIFTS a scheduler class has. A config without the key leaves it at the class's default."""
    import diffusers

    scheduler = getattr(diffusers, str(class_name), None)
    parameters = inspect.signature(scheduler).parameters if isinstance(scheduler, type) else {}
    return [key for key in SHIFTS if key in parameters]
