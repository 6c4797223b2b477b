"""Quantizers of other projects on the same tokens: results that do not depend on this project's numerics.

torchao and comfy_kitchen are installed in `.venv/peers` by `make test`, a folder of their own because diffusers would
import torchao if it found it. llmcompressor is used if it is installed: `pip install --no-deps --target .venv/peers -r
benchmarks/llmcompressor.lock` (its dependencies require an older transformers). torchao and comfy_kitchen round to
nearest, convrot and asym_w4a8 after a rotation; llmcompressor adds GPTQ. None of them searches smoothing or a branch
without a GPU.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.layers import Layer

sys.path.append(str(Path(sys.prefix) / "peers"))

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PeerLayer:
    """The rounded weight [N, K], and the function that rounds the input along K."""

    rounding: Rounding
    weight: Tensor

    def outputs(self, x: Tensor, W: Tensor, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `recipes.Quantized.outputs`; no peer has timestep bins."""
        rounded = self.rounding(x)
        return x @ self.weight.T, rounded @ self.weight.T, rounded @ W.T


def torchao_nvfp4(x: Tensor) -> Tensor:
    """Two-level scales, as in torchao's NVFP4 inference for weights and, dynamically, for activations."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max())).dequantize(torch.float32)


def torchao_mxfp4(x: Tensor) -> Tensor:
    """Scales by RCEIL, the default of torchao's MX inference."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

    return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL).dequantize(torch.float32)


def comfy_int4(x: Tensor) -> Tensor:
    """The quantizer of comfy_kitchen's SVDQuant layer, groups of 64, without smoothing and low-rank branch."""
    from comfy_kitchen.backends.eager.svdquant import _unpack_int4_row_major, quantize_svdquant_w4a4

    packed, scales, _ = quantize_svdquant_w4a4(x, torch.ones(x.shape[1]), torch.zeros(x.shape[1], 1), pad_size=1)
    return (_unpack_int4_row_major(packed).float().unflatten(1, (-1, 64)) * scales.T[..., None]).flatten(1)


def comfy_convrot(x: Tensor) -> Tensor:
    """int4 with one scale per row after a rotation of 256 channels, which is undone afterwards."""
    from comfy_kitchen.backends.eager.convrot_w4a4 import dequantize_convrot_w4a4_weight, quantize_convrot_w4a4_weight

    return dequantize_convrot_w4a4_weight(*quantize_convrot_w4a4_weight(x))


def comfy_int8_row(x: Tensor) -> Tensor:
    """8 bits with one scale per token after a rotation of 256 channels, which is undone afterwards."""
    from comfy_kitchen.backends.eager.quantization import dequantize_int8_convrot_weight, quantize_int8_convrot_weight

    return dequantize_int8_convrot_weight(*quantize_int8_convrot_weight(x, 256), 256)


def comfy_asym_w4a8(layer: Layer, fmt: str) -> PeerLayer:
    """The quantizer of comfy_kitchen's asym_w4a8_int8: codebook, alternating least squares for its group scales."""
    from comfy_kitchen.backends.eager.w4a8_int8 import dequantize_w4a8_int8_weight, quantize_w4a8_int8_weight

    codes, s_rel, s_channel, _, codebook = quantize_w4a8_int8_weight(layer.W)
    weight = dequantize_w4a8_int8_weight(codes, s_rel, s_channel, codebook, output_dtype=torch.float32)
    return PeerLayer(comfy_int8_row, weight)


def nearest(rounding: Rounding, layer: Layer, fmt: str) -> PeerLayer:
    return PeerLayer(rounding, rounding(layer.W))


def llmcompressor_gptq(layer: Layer, fmt: str) -> PeerLayer:
    """GPTQ with act-order and static groups, with the defaults of its schemes; int4 with our groups of 64."""
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize
    from compressed_tensors.quantization.quant_scheme import MXFP4, NVFP4
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    int4 = QuantizationArgs(num_bits=4, type="int", strategy="group", symmetric=True, group_size=64)
    args = {"int4": int4, "mxfp4": MXFP4["weights"], "nvfp4": NVFP4["weights"]}[fmt].model_copy(
        update={"actorder": "weight"}
    )

    def rounding(x: Tensor) -> Tensor:
        scale, zero_point, tensor = _llmcompressor_scales(x, args)
        return fake_quantize(x, scale, zero_point, args, tensor)

    scales = [s if s is None else s[None] for s in _llmcompressor_scales(layer.W, args)]
    activations = layer.activations()
    H = activations.hessian_about(torch.zeros_like(activations.shift))
    weight, _, _ = quantize_weight(layer.W[None].clone(), H[None].clone(), *scales, args)
    return PeerLayer(rounding, weight[0])


def _llmcompressor_scales(x: Tensor, args: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scale and zero point of each group [T, K/g] from its smallest and largest value, and the tensor scale if any."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    groups = x.unflatten(-1, (-1, args.group_size))
    tensor = generate_gparam(x.min(), x.max()) if args.strategy == "tensor_group" else None
    return *calculate_qparams(groups.amin(-1), groups.amax(-1), args, tensor), tensor


@dataclass(frozen=True)
class Peer:
    """module: the module that must be importable."""

    module: str
    formats: tuple[str, ...]
    quantize: Callable[[Layer, str], PeerLayer]


PEERS = {
    "torchao_nvfp4": Peer("torchao.prototype.mx_formats.nvfp4_tensor", ("nvfp4",), partial(nearest, torchao_nvfp4)),
    "torchao_mxfp4": Peer("torchao.prototype.mx_formats.mx_tensor", ("mxfp4",), partial(nearest, torchao_mxfp4)),
    "comfy_int4": Peer("comfy_kitchen.backends.eager.svdquant", ("int4",), partial(nearest, comfy_int4)),
    "comfy_convrot": Peer("comfy_kitchen.backends.eager.convrot_w4a4", ("int4",), partial(nearest, comfy_convrot)),
    "comfy_asym_w4a8": Peer("comfy_kitchen.backends.eager.w4a8_int8", ("asym_w4a8",), comfy_asym_w4a8),
    "llmcompressor": Peer("llmcompressor.modifiers.gptq.gptq_quantize", ("int4", "mxfp4", "nvfp4"), llmcompressor_gptq),
}


def skipped(recipe: str) -> bool:
    """Whether this is a peer that cannot be imported; says so in one line."""
    if recipe in PEERS:
        try:
            import_module(PEERS[recipe].module)
        except ImportError as error:
            print(f"{recipe}: skipped ({error})", file=sys.stderr)
            return True
    return False
