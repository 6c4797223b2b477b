"""What models of a checkpoint do differently from diffusers' methods of the same name, or refuse."""

import os
import tempfile
from functools import partial
from inspect import signature
from typing import Any

from diffusers import ModelMixin

from stepquant.errors import InvalidInput

# Methods of a model; diffusers builds its offloading anew at their end.
CHANGES_OF_LORAS = ("load_lora_adapter", "unload_lora", "delete_adapters")


def refuse_fusing(denoiser: ModelMixin) -> None:
    """Make a quantized denoiser refuse `fuse_lora` before it has changed anything.

    The layers themselves refuse it as well (AbsentWeight), but layers that are not quantized, and the scales of the
    LoRA, would have been changed by then.
    """
    denoiser.fuse_lora = _refuse_fusing


def separate_disk_offload(model: ModelMixin) -> None:
    """Make `enable_group_offload` to disk write into a new folder below the given one.

    diffusers 0.42.1 names the files after the modules and keeps those that are there, so the second expert would read
    the first one's weights, and a later run those of another checkpoint. LoRAs cannot be loaded or unloaded afterwards:
    diffusers would write the empty tensors of the offloaded modules to disk.
    """
    model.enable_group_offload = partial(_enable_group_offload, model)


def _refuse_fusing(*args: Any, **kwargs: Any) -> None:
    raise InvalidInput(
        "fuse_lora: the linears of this denoiser are stored in 4 bits, and a LoRA cannot be added to them. "
        "Keep it loaded beside them (set_adapters), or fuse it into the source model before it is quantized"
    )


def _refuse_change(name: str, *args: Any, **kwargs: Any) -> None:
    raise InvalidInput(
        f"{name}: this model is offloaded to disk, and diffusers would lose its weights. Load and unload LoRAs "
        "before enable_group_offload, or offload without offload_to_disk_path"
    )


def _enable_group_offload(model: ModelMixin, *args: Any, **kwargs: Any) -> None:
    enable = type(model).enable_group_offload
    given = signature(enable).bind(model, *args, **kwargs)
    if folder := given.arguments.get("offload_to_disk_path"):
        os.makedirs(folder, exist_ok=True)
        given.arguments["offload_to_disk_path"] = tempfile.mkdtemp(prefix="model-", dir=folder)
        for name in CHANGES_OF_LORAS:
            setattr(model, name, partial(_refuse_change, name))
    enable(*given.args, **given.kwargs)
