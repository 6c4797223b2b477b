"""A diffusers denoiser, one block at a time: the layers around the blocks (the glue), and each block.

Weights are read on request. At most the glue and one block are in memory. Nothing here depends on quantization.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepquant.errors import UserError
from stepquant.models.block_inputs import BlocksStandIn, Glue
from stepquant.models.families import find_denoiser
from stepquant.models.weights import Weights, open_weights


class Denoiser:
    """One expert's weights, read on request.

    Args:
        folder: the expert's diffusers folder (config.json and safetensors files).
        device: where modules and tensors are put.
        dtype: dtype of the arithmetic; some layers stay float32, as in diffusers.
        weights: read in place of those in the folder, such as weights with LoRAs; None for those in the folder.

    Raises:
        UserError: the weights are missing, damaged or pickled, or the class of the denoiser is not known.
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, weights: Weights | None = None):
        self.weights = open_weights(folder) if weights is None else weights
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.device, self.dtype = device, dtype
        self.description = find_denoiser(self.config.get("_class_name"))
        self._stack = self.description.stack

    @cached_property
    def _class(self) -> Any:
        # Importing diffusers takes seconds and is not needed to read a single weight.
        return self.description.load()

    def glue(self) -> Glue:
        """The denoiser without its blocks. Raises UserError if weights and config.json differ."""
        model: nn.Module = self._class.from_config(self.config | {self._stack.count_key: 0})
        tensors = {key: self._tensor(key) for key in self.weights if not key.startswith(f"{self._stack.attribute}.")}
        self._load(model, tensors)
        stand_in = BlocksStandIn(type(self._empty_block()))
        setattr(model, self._stack.attribute, nn.ModuleList([stand_in]))
        return Glue(
            model.to(self.device).eval().requires_grad_(False),
            stand_in,
            self._stack.carried,
            self.description.timestep,
            self.dtype,
            self.device,
        )

    def block(self, index: int) -> nn.Module:
        """Block `index` in evaluation mode, without gradients of its parameters.

        Raises:
            UserError: weights and config.json differ.
        """
        block = self._empty_block()
        prefix = f"{self._stack.attribute}.{index}."
        tensors = {key.removeprefix(prefix): self._tensor(key) for key in self.weights if key.startswith(prefix)}
        self._load(block, tensors)
        return block.to(self.device).eval().requires_grad_(False)

    def _empty_block(self) -> nn.Module:
        """A block without weights."""
        with torch.device("meta"):
            model = self._class.from_config(self.config | {self._stack.count_key: 1})
        block: nn.Module = getattr(model, self._stack.attribute)[0]
        return block

    def linear_weight(self, index: int, linear: str) -> torch.Tensor:
        """Weight [N, K] of a linear, as float32 on the device.

        Args:
            index: number of the block.
            linear: module path inside the block, such as "attn1.to_q".

        Raises:
            UserError: there is no such tensor.
        """
        return self._on_device(f"{self._stack.attribute}.{index}.{linear}.weight").float()

    def linear_bias(self, index: int, linear: str) -> torch.Tensor:
        """Bias [N] of a linear in the stored dtype, on the device; zeros of the weight's dtype if it has none.

        Args:
            index: number of the block.
            linear: module path inside the block.

        Raises:
            UserError: the linear has no weight.
        """
        key = f"{self._stack.attribute}.{index}.{linear}"
        if f"{key}.bias" in self.weights:
            return self._on_device(f"{key}.bias")
        weight = self.weights.info(f"{key}.weight")
        return torch.zeros(weight.shape[0], dtype=weight.dtype, device=self.device)

    def _on_device(self, key: str) -> torch.Tensor:
        """A stored tensor on the device, to be cast there: the stored dtype has the fewest bytes to copy."""
        return self.weights.get(key).to(self.device)

    def _tensor(self, key: str) -> torch.Tensor:
        # diffusers keeps norms, time embedding and modulation in float32 for every torch_dtype.
        keep = any(name in key.split(".") for name in self._class._keep_in_fp32_modules)
        return self._on_device(key).to(torch.float32 if keep else self.dtype)

    def _load(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        try:
            missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:  # a shape differs
            raise UserError(
                f"{self.weights.folder}: weights do not fit config.json: {str(error).splitlines()[-1].strip()}"
            ) from None
        if missing or unexpected:
            what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {unexpected[0]}"
            raise UserError(
                f"{self.weights.folder}: the checkpoint {what}; expected the weights of {self._class.__name__}"
            )
