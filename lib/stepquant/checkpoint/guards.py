"""What a quantized denoiser does differently from diffusers' methods of the same name, or refuses."""

import os
import tempfile
from functools import partial
from inspect import signature
from typing import Any

from diffusers import ModelMixin

from stepquant.errors import InvalidInput

# Of a denoiser; diffusers builds its offloading anew at their end.
CHANGES_OF_LORAS = ("load_lora_adapter", "unload_lora", "delete_adapters")


def guard(denoiser: ModelMixin) -> None:
    """Replace two methods of a quantized denoiser.

    - `fuse_lora` is refused before it has changed anything. The layers themselves refuse it as well (AbsentWeight), but
      layers that are not quantized, and the scales of the LoRA, would have been changed by then.
    - `enable_group_offload` to disk writes into a new folder below the given one. diffusers names the files after the
      modules and keeps those that are there, so the second expert would read the first one's weights, and a later run
      those of another checkpoint. LoRAs cannot be loaded or unloaded afterwards: diffusers would write the empty
      tensors of the offloaded modules to disk.
    """
    denoiser.fuse_lora = _refuse_fusing
    denoiser.enable_group_offload = partial(_enable_group_offload, denoiser)


def _refuse_fusing(*args: Any, **kwargs: Any) -> None:
    raise InvalidInput(
        "fuse_lora: the linears of this denoiser are stored in 4 bits, and a LoRA cannot be added to them. "
        "Keep it loaded beside them (set_adapters), or fuse it into the source model before it is quantized"
    )


def _refuse_change(name: str, *args: Any, **kwargs: Any) -> None:
    raise InvalidInput(
        f"{name}: this denoiser is offloaded to disk, and diffusers would lose its weights. Load and unload LoRAs "
        "before enable_group_offload, or offload without offload_to_disk_path"
    )


def _enable_group_offload(denoiser: ModelMixin, *args: Any, **kwargs: Any) -> None:
    enable = type(denoiser).enable_group_offload
    given = signature(enable).bind(denoiser, *args, **kwargs)
    if folder := given.arguments.get("offload_to_disk_path"):
        os.makedirs(folder, exist_ok=True)
        given.arguments["offload_to_disk_path"] = tempfile.mkdtemp(prefix="denoiser-", dir=folder)
        for name in CHANGES_OF_LORAS:
            setattr(denoiser, name, partial(_refuse_change, name))
    enable(*given.args, **given.kwargs)
