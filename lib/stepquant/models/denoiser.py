"""A diffusers denoiser, one block at a time: the layers before the blocks (the prologue), and each block.

Weights are read on request. At most the prologue and one block are in memory. Nothing here depends on quantization.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepquant.errors import UserError
from stepquant.models.weights import Weights, open_weights


@dataclass(frozen=True)
class BlockInputs:
    """The arguments that WanTransformer3DModel passes to its first block, for B calls.

    Attributes:
        hidden_states: [B, T, D].
        encoder_hidden_states: text states [B, L, D].
        timestep_proj: modulation from t, [B, 6, D] float32.
        rotary_emb: cosines and sines [1, T, 1, head_dim] float32, the same for all calls.
    """

    hidden_states: torch.Tensor
    encoder_hidden_states: torch.Tensor
    timestep_proj: torch.Tensor
    rotary_emb: tuple[torch.Tensor, torch.Tensor]

    def with_hidden_states(self, hidden_states: torch.Tensor) -> "BlockInputs":
        """The same inputs with other hidden states."""
        return replace(self, hidden_states=hidden_states)

    def kept(self, earlier: "BlockInputs | None") -> "BlockInputs":
        """The inputs to keep while the hidden states change from block to block.

        Args:
            earlier: kept inputs of other calls, if there are any.

        Returns:
            The inputs without hidden states, and with the rotary embeddings of `earlier` if they are equal.
        """
        rotary = self.rotary_emb
        if earlier is not None and all(map(torch.equal, rotary, earlier.rotary_emb)):
            rotary = earlier.rotary_emb
        return replace(self, hidden_states=torch.empty(0), rotary_emb=rotary)


class _Caught(Exception):
    """Carries the first block's arguments out of the denoiser's forward."""


class _Catcher(nn.Module):
    """Stands in for the blocks and ends the forward."""

    def forward(self, *args: Any) -> None:
        raise _Caught(*args)


class Denoiser:
    """One expert's weights, read on request.

    Args:
        folder: the expert's diffusers folder (config.json and safetensors files).
        device: where modules and tensors are put.
        dtype: dtype of the arithmetic; some layers stay float32, as in diffusers.
        weights: read in place of those in the folder, such as weights with LoRAs; None for those in the folder.

    Raises:
        UserError: the weights are missing, damaged or pickled.
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, weights: Weights | None = None):
        self.weights = open_weights(folder) if weights is None else weights
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.device, self.dtype = device, dtype

    @cached_property
    def _class(self) -> Any:
        # Importing diffusers takes seconds and is not needed to read a single weight.
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel

    def prologue(self) -> nn.Module:
        """The denoiser without its blocks, for `block_inputs`. Raises UserError if weights and config.json differ."""
        model: nn.Module = self._class.from_config(self.config | {"num_layers": 0})
        tensors = {key: self._tensor(key) for key in self.weights if not key.startswith("blocks.")}
        self._load(model, tensors)
        model.blocks = nn.ModuleList([_Catcher()])
        return model.to(self.device).eval()

    def block(self, index: int) -> nn.Module:
        """Block `index` in evaluation mode. Raises UserError if weights and config.json differ."""
        with torch.device("meta"):
            block: nn.Module = self._class.from_config(self.config | {"num_layers": 1}).blocks[0]
        prefix = f"blocks.{index}."
        tensors = {key.removeprefix(prefix): self._tensor(key) for key in self.weights if key.startswith(prefix)}
        self._load(block, tensors)
        return block.to(self.device).eval()

    def linear_weight(self, index: int, linear: str) -> torch.Tensor:
        """Weight [N, K] of a linear, as float32 on the device.

        Args:
            index: number of the block.
            linear: module path inside the block, such as "attn1.to_q".

        Raises:
            UserError: there is no such tensor.
        """
        return self._on_device(f"blocks.{index}.{linear}.weight").float()

    def linear_bias(self, index: int, linear: str) -> torch.Tensor:
        """Bias [N] of a linear in the stored dtype, on the device; zeros of the weight's dtype if it has none.

        Args:
            index: number of the block.
            linear: module path inside the block.

        Raises:
            UserError: the linear has no weight.
        """
        key = f"blocks.{index}.{linear}"
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


def block_inputs(
    prologue: nn.Module, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
) -> BlockInputs:
    """Compute the first block's inputs for B recorded calls.

    Args:
        prologue: from `Denoiser.prologue`.
        hidden_states: [B, C, F, H, W].
        timestep: [B].
        encoder_hidden_states: [B, L, text_dim].

    Returns:
        The inputs, on the prologue's device.
    """
    parameter = next(prologue.get_submodule("patch_embedding").parameters())
    try:
        prologue(
            hidden_states=hidden_states.to(parameter.device, parameter.dtype),
            timestep=timestep.to(parameter.device),
            encoder_hidden_states=encoder_hidden_states.to(parameter.device, parameter.dtype),
        )
    except _Caught as caught:
        return BlockInputs(*caught.args)
    raise AssertionError("the denoiser's forward never reached its blocks")
