"""A quantized linear in memory, in the layout of stepquant.runtime.layout."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stepquant.formats import Scales, pack_nibbles
from stepquant.quantize.quantized_layer import QuantizedLayer
from stepquant.runtime.layout import QuantizationSettings, linear_layout


@dataclass(frozen=True)
class PackedLinear:
    """The tensors that replace the weight of one linear; None where the layout has no such tensor."""

    qweight: Tensor
    wscales: Tensor
    smooth_factor: Tensor
    wtscale: Tensor | None = None
    wcscales: Tensor | None = None
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None
    clip_ratio: Tensor | None = None
    clip_exponent: Tensor | None = None
    mean: Tensor | None = None
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, without the absent ones."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    def check(self, settings: QuantizationSettings, N: int, K: int) -> None:
        """Raises ValueError unless names, shapes and dtypes are those of a quantized [N, K] linear."""
        found = {name: (tuple(t.shape), t.dtype) for name, t in self.tensors().items()}
        expected = linear_layout(settings, N, K)
        if settings.mean_subtraction:  # in the dtype of the source's bias
            expected |= {"bias": ((N,), None if self.bias is None else self.bias.dtype)}
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if wrong:
            differences = "; ".join(f"{n} is {found.get(n)}, expected {expected.get(n)}" for n in wrong)
            raise ValueError(f"packed linear does not fit its settings: {differences}")


def pack_site(
    layer: QuantizedLayer,
    linears: Mapping[str, tuple[int, int]],
    biases: Mapping[str, Tensor],
    clip: tuple[Tensor | None, Tensor | None],
    *,
    mean_subtraction: bool,
) -> dict[str, PackedLinear]:
    """The linears of a site from its stacked layer, on the CPU.

    linears: shape (N, K) by module path, in the order in which their rows are stacked. biases [N]: the source's, by module path; with
    mean_subtraction they take what the mean contributes. clip: ratio and exponent offset per bin, as in `pack_linear`.
    """
    packed, start = {}, 0
    for path, (N, _) in linears.items():
        rows = slice(start, start := start + N)
        mean = bias = None
        if mean_subtraction:
            mean, bias = (
                layer.transform.mean.cpu(),
                (biases[path].float() + layer.offset[rows]).to(biases[path].dtype).cpu(),
            )
        rank = layer.proj_down.shape[1]
        packed[path] = pack_linear(
            layer.codes[rows].cpu(),
            Scales(layer.scales.group[rows].cpu(), None if layer.scales.tensor is None else layer.scales.tensor.cpu()),
            layer.transform.smooth.cpu(),
            proj_down=layer.proj_down.cpu() if rank else None,
            proj_up=layer.proj_up[rows].cpu() if rank else None,
            clip_ratio=clip[0],
            clip_exponent=clip[1],
            mean=mean,
            bias=bias,
        )
    return packed


def pack_linear(
    codes: Tensor,
    scales: Scales,
    smooth: Tensor,
    *,
    proj_down: Tensor | None = None,
    proj_up: Tensor | None = None,
    clip_ratio: Tensor | None = None,
    clip_exponent: Tensor | None = None,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
) -> PackedLinear:
    """Packs the 4-bit codes of one linear and lays its scales out as stored.

    codes: uint8 [N, K], 0..15. scales: as Format.scales or weight_scales gave them, group [N, K/G].
    smooth bfloat16 [K], proj_down bfloat16 [K, R] for the raw input, proj_up bfloat16 [N, R] (both None for rank 0),
    clip_ratio float32 [bins] (None if activations stay unquantized), clip_exponent int8 [bins] (None unless they are mxfp4),
    mean bfloat16 [K] and bias [N] (both None unless a mean is subtracted).

    Nothing is rounded here, because what was rounded after the residual was formed would not be corrected by it:
    raises ValueError if the tensor scale is no bfloat16 value, and PackedLinear.check finds any other dtype.
    """
    N, _ = codes.shape
    wtscale = wcscales = None
    if scales.tensor is not None:
        wtscale = scales.tensor.to(torch.bfloat16).reshape(1)
        if wtscale.item() != scales.tensor.item():
            found = scales.tensor.item()
            raise ValueError(f"tensor scale {found} is no bfloat16 value; round it before computing group scales")
        wcscales = torch.ones(N, dtype=torch.bfloat16, device=codes.device)
    return PackedLinear(
        qweight=pack_nibbles(codes).view(torch.int8),
        wscales=scales.group.T.contiguous(),
        smooth_factor=smooth,
        wtscale=wtscale,
        wcscales=wcscales,
        proj_down=proj_down,
        proj_up=proj_up,
        clip_ratio=clip_ratio,
        clip_exponent=clip_exponent,
        mean=mean,
        bias=bias,
    )
