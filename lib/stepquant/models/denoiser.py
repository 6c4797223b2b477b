"""A diffusers denoiser, one block at a time: what stands before the blocks, and each block, from lazily read weights.

Nothing here knows about quantization, and nothing holds more than the prologue and one block.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepquant.errors import UserError
from stepquant.models.weights import Weights, open_weights


@dataclass(frozen=True)
class BlockInputs:
    """What WanTransformer3DModel hands to its first block, for B calls.

    hidden_states [B, T, D]; encoder_hidden_states [B, L, D]; timestep_proj [B, 6, D] float32; rotary_emb: one pair of
    tensors for all calls.
    """

    hidden_states: torch.Tensor
    encoder_hidden_states: torch.Tensor
    timestep_proj: torch.Tensor
    rotary_emb: tuple[torch.Tensor, torch.Tensor]

    def with_hidden_states(self, hidden_states: torch.Tensor) -> "BlockInputs":
        return BlockInputs(hidden_states, self.encoder_hidden_states, self.timestep_proj, self.rotary_emb)


class _Caught(Exception):
    """Carries the first block's arguments out of the denoiser's forward."""


class _Catcher(nn.Module):
    def forward(self, *args: Any) -> None:
        raise _Caught(*args)


class Denoiser:
    """One expert's weights folder, opened lazily. device and dtype are those of the arithmetic."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        self.weights: Weights = open_weights(folder)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.device, self.dtype = device, dtype

    @cached_property
    def _class(self) -> Any:
        # Importing diffusers takes seconds; whoever only reads weights can do without.
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel

    def prologue(self) -> nn.Module:
        """The denoiser without its blocks; give its calls to `block_inputs`."""
        model = self._class.from_config(self.config | {"num_layers": 0})
        tensors = {key: self._tensor(key) for key in self.weights if not key.startswith("blocks.")}
        self._load(model, tensors)
        model.blocks = nn.ModuleList([_Catcher()])
        return model.to(self.device).eval()

    def block(self, index: int) -> nn.Module:
        """Block `index` with its weights, in evaluation mode."""
        with torch.device("meta"):
            block = self._class.from_config(self.config | {"num_layers": 1}).blocks[0]
        prefix = f"blocks.{index}."
        tensors = {key.removeprefix(prefix): self._tensor(key) for key in self.weights if key.startswith(prefix)}
        self._load(block, tensors)
        return block.to(self.device).eval()

    def linear_weight(self, index: int, linear: str) -> torch.Tensor:
        """Weight [N, K] of a block's linear as float32 on the compute device."""
        return self.weights.get(f"blocks.{index}.{linear}.weight").to(self.device, torch.float32)

    def linear_bias(self, index: int, linear: str) -> torch.Tensor:
        """Bias [N] of a block's linear as it is stored, on the compute device; zeros of the weight's dtype if it has none."""
        key = f"blocks.{index}.{linear}"
        if f"{key}.bias" in self.weights:
            return self.weights.get(f"{key}.bias").to(self.device)
        weight = self.weights.info(f"{key}.weight")
        return torch.zeros(weight.shape[0], dtype=weight.dtype, device=self.device)

    def _tensor(self, key: str) -> torch.Tensor:
        # diffusers keeps norms, time embedding and modulation in float32 whatever torch_dtype is asked for.
        keep = any(name in key.split(".") for name in self._class._keep_in_fp32_modules)
        return self.weights.get(key).to(torch.float32 if keep else self.dtype)

    def _load(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        try:
            missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:  # torch says so if a shape differs
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
    """The first block's inputs for B recorded calls: hidden_states [B, C, F, H, W], timestep [B], text [B, L, text_dim]."""
    parameter = next(prologue.patch_embedding.parameters())
    cast = {"device": parameter.device, "dtype": parameter.dtype}
    try:
        prologue(
            hidden_states=hidden_states.to(**cast),
            timestep=timestep.to(parameter.device),
            encoder_hidden_states=encoder_hidden_states.to(**cast),
        )
    except _Caught as caught:
        return BlockInputs(*caught.args)
    raise AssertionError("the denoiser's forward never reached its blocks")
