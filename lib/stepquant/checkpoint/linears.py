"""Single quantized linears of a checkpoint, without loading the rest."""

from pathlib import Path

import torch

from stepquant.errors import InvalidInput
from stepquant.models.configs import read_config
from stepquant.models.weights import Weights
from stepquant.runtime.layout import QuantizationSettings, linear_layout
from stepquant.runtime.linear import W4A4Linear


def read_settings(folder: Path) -> QuantizationSettings:
    """The quantization settings of a denoiser in a checkpoint.

    Args:
        folder: the folder of the denoiser, such as `full/transformer`.

    Raises:
        InvalidInput: if the denoiser is not quantized.
        UserError: as `QuantizationSettings.from_config`.
    """
    config = read_config(folder / "config.json")
    if "quantization_config" not in config:
        raise InvalidInput(
            f"{folder}: config.json has no quantization_config; expected a denoiser that stage pack wrote"
        )
    return QuantizationSettings.from_config(config["quantization_config"])


def read_linear(weights: Weights, settings: QuantizationSettings, target: str, device: str) -> W4A4Linear:
    """One quantized linear.

    Args:
        weights: of the denoiser, from `open_weights`.
        settings: of the denoiser, from `read_settings`.
        target: module path of the linear.
        device: where its tensors are put.

    Raises:
        UserError: if the checkpoint lacks one of its tensors.
    """
    N, half_K = weights.shape(f"{target}.qweight")
    K = 2 * half_K
    has_bias = f"{target}.bias" in weights
    rotation, eight_bit_bins = settings.rotations.get(target, 0), settings.eight_bit_bins.get(target, ())
    linear = W4A4Linear(K, N, has_bias, settings, device, rotation, eight_bit_bins)
    for name in linear_layout(settings, N, K):
        setattr(linear, name, weights.get(f"{target}.{name}").to(device))
    if has_bias:
        linear.bias.copy_(weights.get(f"{target}.bias").to(device, torch.float32))
    return linear
