"""Timestep-aware W4A4 quantization of image-to-video diffusion transformers.

    import stepquant, torch
    pipe = stepquant.load_pipeline("wan2.2-i2v-w4a4", dtype=torch.bfloat16, device="cuda")

To load with diffusers alone, call `stepquant.register()` once; after it, `from_pretrained` of pipelines and
transformers reads stepquant folders. Importing stepquant stays quick: torch and diffusers come with the first use.
"""

_LAZY = {
    "load_pipeline": "stepquant.checkpoint.pipeline",
    "register": "stepquant.checkpoint.quantizer",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'stepquant' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
