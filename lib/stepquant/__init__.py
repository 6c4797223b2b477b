"""Timestep-aware W4A4 quantization of video diffusion transformers.

    import stepquant, torch

    pipe = stepquant.load_pipeline("artifacts/checkpoints/full", dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()

To load with diffusers alone, call `stepquant.register()` once. After that, `from_pretrained` of diffusers' pipelines
and models reads stepquant checkpoints. `import stepquant` is quick: torch and diffusers are imported at first use.
"""

__version__ = "0.1.0"

__all__ = [
    "DamagedFile",
    "InvalidInput",
    "MissingFile",
    "OutOfMemory",
    "StepquantError",
    "UnsupportedCheckpoint",
    "UserError",
    "__version__",
    "load_pipeline",
    "register",
]

# Where a name of __all__ is defined; the errors are in stepquant.errors.
_HOMES = {"load_pipeline": "stepquant.checkpoint.pipeline", "register": "stepquant.checkpoint.quantizer"}

# Type checkers take this name for true. It is not imported from typing, because a module without imports at its top
# level is left out of the code version of every stage (storage/code_version.py).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from stepquant.checkpoint.pipeline import load_pipeline
    from stepquant.checkpoint.quantizer import register
    from stepquant.errors import (
        DamagedFile,
        InvalidInput,
        MissingFile,
        OutOfMemory,
        StepquantError,
        UnsupportedCheckpoint,
        UserError,
    )

else:  # hidden from type checkers, which would take any name for an attribute

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'stepquant' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_HOMES.get(name, "stepquant.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
