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
        """The tensors that are present, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    def check(self, settings: QuantizationSettings, N: int, K: int) -> None:
        """Compare names, shapes and dtypes with those of a quantized [N, K] linear.

        Raises:
            ValueError: if one differs.
        """
        found = {name: (tuple(t.shape), t.dtype) for name, t in self.tensors().items()}
        expected = linear_layout(settings, N, K)
        if settings.mean_subtraction:
            expected["bias"] = ((N,), torch.float32)
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
    """Pack the linears of a site.

    Args:
        layer: the quantized layer of the site, the rows of all its linears stacked.
        linears: shape (N, K) by module path, in the order in which their rows are stacked.
        biases: the source's bias [N] by module path; used with mean subtraction only.
        clip: clip ratio and exponent offset per bin, as in `pack_linear`.
        mean_subtraction: whether the layer subtracts a mean, so that it is stored and its contribution to the output is
            added to the biases.

    Returns:
        The packed linears by module path, on the CPU.
    """
    packed, start = {}, 0
    for path, (N, _) in linears.items():
        rows = slice(start, start := start + N)
        scales, rank = layer.scales, layer.proj_down.shape[1]
        row = None if scales.row is None else scales.row[rows].cpu()
        bias = biases[path].float() + layer.offset[rows] if mean_subtraction else None
        packed[path] = pack_linear(
            layer.codes[rows].cpu(),
            Scales(scales.group[rows].cpu(), None if scales.tensor is None else scales.tensor.cpu(), row),
            layer.transform.smooth.cpu(),
            proj_down=layer.proj_down.cpu() if rank else None,
            proj_up=layer.proj_up[rows].cpu() if rank else None,
            clip_ratio=clip[0],
            clip_exponent=clip[1],
            mean=layer.transform.mean.cpu() if mean_subtraction else None,
            bias=None if bias is None else bias.cpu(),
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
    """Pack the 4-bit codes of one linear, and arrange its scales as they are stored.

    Nothing is rounded here. The residual was computed with the stored values of everything else, so rounding one of
    them now would add an error that nothing corrects.

    Args:
        codes: uint8 [N, K], 0..15.
        scales: from `Format.scales` or `weight_scales`; group [N, K/G].
        smooth: bfloat16 [K].
        proj_down: bfloat16 [K, R], applied to the raw input; None for rank 0.
        proj_up: bfloat16 [N, R]; None for rank 0.
        clip_ratio: float32 [bins]; None if activations stay unquantized.
        clip_exponent: int8 [bins]; None unless activations are mxfp4.
        mean: bfloat16 [K]; None unless a mean is subtracted.
        bias: float32 [N]; None unless a mean is subtracted.

    Returns:
        The packed linear. `PackedLinear.check` compares its tensors with the layout.

    Raises:
        ValueError: if the scale of the whole tensor is not a bfloat16 value.
    """
    N, _ = codes.shape
    wtscale, wcscales = None, scales.row
    if scales.tensor is not None:
        wtscale = scales.tensor.to(torch.bfloat16).reshape(1)
        if wtscale.item() != scales.tensor.item():
            found = scales.tensor.item()
            raise ValueError(f"tensor scale {found} is not a bfloat16 value; round it before computing group scales")
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
