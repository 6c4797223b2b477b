"""Single quantized linears of a checkpoint, without loading the rest."""

import json
from pathlib import Path

import torch

from stepquant.errors import UserError
from stepquant.models.weights import Weights
from stepquant.runtime.layout import QuantizationSettings, linear_layout
from stepquant.runtime.linear import W4A4Linear


def read_settings(folder: Path) -> QuantizationSettings:
    """The quantization settings of a packed denoiser's folder. Raises UserError if it has none."""
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" not in config:
        raise UserError(f"{folder}: config.json has no quantization_config; expected a denoiser that stage pack wrote")
    return QuantizationSettings.from_config(config["quantization_config"])


def read_linear(weights: Weights, settings: QuantizationSettings, target: str, device: str) -> W4A4Linear:
    """The linear called `target` as packed, on a device; its bias, if there is one, in float32."""
    N, half_K = weights.shape(f"{target}.qweight")
    K = 2 * half_K
    has_bias = f"{target}.bias" in weights
    linear = W4A4Linear(K, N, has_bias, settings, device, rotation=settings.rotations.get(target, 0))
    for name in linear_layout(settings, N, K):
        setattr(linear, name, weights.get(f"{target}.{name}").to(device))
    if has_bias:
        linear.bias.copy_(weights.get(f"{target}.bias").to(device, torch.float32))
    return linear
