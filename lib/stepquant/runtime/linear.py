"""The quantized linear: packed 4-bit weights, a low-rank branch, 4- or 8-bit activations per timestep bin.

A reference implementation of the layout in stepquant.runtime.layout. Every forward dequantizes the whole weight, and
quantizes and dequantizes the activations. It saves memory, not time: engines with 4-bit kernels need an export.

Memory: the weight is dequantized in panels of rows and the tokens are processed in slabs, so a forward needs, besides
input and output, one weight in the dtype of x and float32 temporaries whose size does not depend on the number of
tokens. Under torch.compile both are done in one piece: the compiler fuses the temporaries, and its graph stays small
and independent of the number of tokens.

A layer with 4 bits in some bins and 8 in others rounds its input to both and selects on the device, so that one graph
holds for all bins and the bin is never read on the host. A layer with one precision computes that one alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepquant.errors import InvalidInput
from stepquant.formats import Format, Scales, check_groups, get_format, unpack_nibbles
from stepquant.quantize.activation_scales import fake_quantize_activation
from stepquant.quantize.rotate import check_rotation, hadamard
from stepquant.quantize.transform import transform_input
from stepquant.runtime.absent_weight import AbsentWeight
from stepquant.runtime.layout import QuantizationSettings, linear_layout
from stepquant.runtime.timestep_bin import TimestepBin

# With 13,824 channels, the widest input of Wan2.2-I2V-A14B, a float32 temporary has 57 MB in a slab, 28 MB in a panel.
TOKENS_PER_SLAB = 1024
ROWS_PER_PANEL = 512


class W4A4Linear(nn.Linear):
    """A quantized replacement of nn.Linear, with the buffers of `linear_layout` and the bias of the original, if any.

    It is an nn.Linear so that libraries that search for linears (LoRA loaders) find it; its `weight` has no values
    (AbsentWeight). `bin` selects the clip, or 8 bits instead; `stepquant.runtime.timestep.follow_timestep` sets it.
    Input and output have the dtype of x. Scales, smoothing and rounding are computed in float32, and the bias is added
    in float32.

    Every tensor keeps its dtype: `to`, `half` and the like move them, but do not cast them.

    Attributes:
        compute_dtype: dtype of the activations, which `weight` shows. PEFT gives it to the LoRAs that it puts beside
            the layer.
    """

    qweight: Tensor
    wscales: Tensor
    wtscale: Tensor
    wcscales: Tensor
    smooth_factor: Tensor
    mean: Tensor
    proj_down: Tensor
    proj_up: Tensor
    clip_ratio: Tensor
    clip_exponent: Tensor
    hadamard: Tensor
    has_eight_bits: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        settings: QuantizationSettings,
        device: torch.device | str,
        rotation: int = 0,
        eight_bit_bins: tuple[int, ...] = (),
    ):
        """Create the layer. Its stored tensors are uninitialized until they are loaded.

        Args:
            in_features: K, number of input channels.
            out_features: N, number of output channels.
            bias: whether the layer has a bias; with mean subtraction it needs one.
            settings: formats, rank and timestep bins of the denoiser.
            device: of the stored tensors; "meta" allocates nothing.
            rotation: Hadamard size of this layer's input; 0 for no rotation.
            eight_bit_bins: bins in which this layer's input is rounded to the 8-bit format of the settings.

        Raises:
            UserError: if the group size of a format or the Hadamard size does not divide K, or if the settings have no
                8-bit format or not as many bins.
        """
        nn.Module.__init__(self)  # that of nn.Linear would allocate the float weight
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = get_format(settings.weight_format)
        self.activation_format = None if settings.activation_format is None else get_format(settings.activation_format)
        self.activation_rounding = settings.activation_rounding
        self.activation_scales = settings.activation_scales
        self.rank = settings.rank
        self.mean_subtraction = settings.mean_subtraction
        self.rotation = rotation
        self.eight_bit_bins = eight_bit_bins
        self.eight_bit_format = _eight_bit_format(settings, eight_bit_bins)
        self.mixed = 0 < len(eight_bit_bins) < settings.bins
        self.bin = TimestepBin()
        self.compute_dtype = torch.float32
        check_rotation(rotation, in_features, kind=settings.hadamard)
        for fmt in (self.weight_format, self.activation_format, self.eight_bit_format):
            if fmt is not None:
                check_groups(in_features, fmt, "linear input")
        for name, (shape, dtype) in linear_layout(settings, out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        # Computed, never loaded: these must hold values where the others are still on "meta".
        on = "cpu" if torch.device(device).type == "meta" else device
        if rotation:
            self.register_buffer("hadamard", hadamard(rotation, settings.hadamard, device=on), persistent=False)
        if self.mixed:
            table = torch.tensor([index in eight_bit_bins for index in range(settings.bins)], device=on)
            self.register_buffer("has_eight_bits", table, persistent=False)
        values = nn.Parameter(torch.empty(out_features, dtype=torch.float32, device=device), requires_grad=False)
        self.register_parameter("bias", values if bias else None)

    # A property, not a parameter: nothing that stores or moves parameters finds it, and it takes no memory.
    @property
    def weight(self) -> AbsentWeight:  # type: ignore[override]
        """Shape, dtype and device of the weight; anything else raises InvalidInput."""
        return AbsentWeight((self.out_features, self.in_features), self.compute_dtype, self.qweight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Every move and cast of a module ends here. Moves are made; casts are not, for they would round scales."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Output [..., N] of the layer for x [..., K], in the dtype of x and with the clip of the current bin.

        Raises:
            InvalidInput: if the denoiser was called with one timestep per sample, and x has another number of samples.
        """
        weight, bins = self.dequantized_weight(x.dtype), self._bins(x)
        if torch.compiler.is_compiling() or x.shape[:-1].numel() <= TOKENS_PER_SLAB:
            return self._forward_slab(x, weight, bins)
        tokens = x.flatten(0, -2)
        if len(bins) > 1:  # of each token
            bins = bins.unsqueeze(1).expand(-1, len(tokens) // len(bins)).flatten()
        y = x.new_empty(len(tokens), self.out_features)
        for start in range(0, len(tokens), TOKENS_PER_SLAB):
            slab = slice(start, start + TOKENS_PER_SLAB)
            y[slab] = self._forward_slab(tokens[slab], weight, bins[slab] if len(bins) > 1 else bins)
        return y.view(*x.shape[:-1], self.out_features)

    def _bins(self, x: Tensor) -> Tensor:
        """The current bin, int64 [1], or that of each sample of x [B, ..., K], int64 [B]."""
        bins = self.bin.on(x.device)
        if len(bins) > 1 and (x.dim() < 2 or len(x) != len(bins)):
            raise InvalidInput(
                f"input of a quantized linear: shape {tuple(x.shape)}, but the denoiser was called with "
                f"{len(bins)} timesteps; expected as many samples in the first dimension, or one timestep for all"
            )
        return bins

    def _forward_slab(self, x: Tensor, weight: Tensor, bins: Tensor) -> Tensor:
        # The mean's contribution to the bias can be much larger than the output: it is added before any rounding.
        y = F.linear(self._quantized_input(x, bins), weight).float()
        if self.bias is not None:
            y += self.bias
        if self.rank > 0:
            y += F.linear(x @ self.proj_down.to(x.dtype), self.proj_up.to(x.dtype))
        return y.to(x.dtype)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input of the 4-bit GEMM: x [..., K] transformed and fake-quantized with the clip of the current bin.

        Returns:
            A tensor of the shape and dtype of x. Its values are multiples of the group scales, which are computed in
            float32; if activations stay unquantized, it is the transformed x.
        """
        return self._quantized_input(x, self._bins(x))

    def _quantized_input(self, x: Tensor, bins: Tensor) -> Tensor:
        """bins: int64 [1], or the bin of each entry of the first dimension of x."""
        mean, matrix = self.mean if self.mean_subtraction else None, self.hadamard if self.rotation else None
        z = transform_input(x, self.smooth_factor, mean, matrix)
        fmt = self.activation_format
        if fmt is None:
            return z.to(x.dtype)
        if self.eight_bit_format is None:
            return self._in_four_bits(fmt, z, bins).to(x.dtype)
        eight_bits = self.eight_bit_format.fake_quantize(z, rounding=self.activation_rounding).to(x.dtype)
        if not self.mixed:
            return eight_bits
        # Both are computed: a branch would need the bin on the host, and one sample may differ from the next.
        four_bits = self._in_four_bits(fmt, z, bins).to(x.dtype)
        return torch.where(_per_sample(self.has_eight_bits, bins, z), eight_bits, four_bits)

    def _in_four_bits(self, fmt: Format, z: Tensor, bins: Tensor) -> Tensor:
        """The transformed input z rounded with the clip of each bin, float32."""
        ratio = _per_sample(self.clip_ratio, bins, z)
        offset = _per_sample(self.clip_exponent, bins, z) if fmt.name == "mxfp4" else 0
        return fake_quantize_activation(
            z, fmt, self.activation_scales, clip=ratio, exponent_offset=offset, rounding=self.activation_rounding
        )

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The 4-bit part of the weight, [N, K]. It applies to the transformed input and excludes the low-rank branch.

        Args:
            dtype: of the result; values are computed in float32 and then rounded to it.
        """
        if torch.compiler.is_compiling():
            return self._dequantized_rows(slice(None)).to(dtype)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.qweight.device)
        for start in range(0, self.out_features, ROWS_PER_PANEL):
            rows = slice(start, start + ROWS_PER_PANEL)
            weight[rows] = self._dequantized_rows(rows)
        return weight

    def _dequantized_rows(self, rows: slice) -> Tensor:
        codes = unpack_nibbles(self.qweight[rows].view(torch.uint8))
        scales = self.wscales.T[rows]
        if self.weight_format.has_row_scale:
            return self.weight_format.decode(codes, Scales(scales, None, self.wcscales[rows]))
        if not self.weight_format.has_tensor_scale:
            return self.weight_format.decode(codes, Scales(scales, None))
        values = self.weight_format.decode(codes, Scales(scales, self.wtscale.float().squeeze()))
        return values * self.wcscales[rows].float().unsqueeze(1)

    def extra_repr(self) -> str:
        activation = self.activation_format.name if self.activation_format else "unquantized"
        if self.eight_bit_format:
            activation += f" ({self.eight_bit_format.name} in bins {', '.join(map(str, self.eight_bit_bins))})"
        return (
            f"{super().extra_repr()}, weight={self.weight_format.name}, activation={activation}, "
            f"rank={self.rank}, rotation={self.rotation}"
        )


def _eight_bit_format(settings: QuantizationSettings, bins: tuple[int, ...]) -> Format | None:
    """The format of the bins, None if there are none. Raises InvalidInput if the settings lack the format or a bin."""
    if not bins:
        return None
    if settings.eight_bit_format is None or not set(bins) <= set(range(settings.bins)):
        raise InvalidInput(
            f"eight_bit_bins of a linear are {list(bins)}, but the settings have eight_bit_format "
            f"{settings.eight_bit_format!r} and {settings.bins} bins; allowed: indices of bins, with a format"
        )
    return get_format(settings.eight_bit_format)


def _per_sample(table: Tensor, bins: Tensor, x: Tensor) -> Tensor:
    """The entries [B] of the bins, in a shape that broadcasts to x [..., K] or x [B, ..., K]."""
    # index_select by a tensor, not an int: torch.compile then has one graph for all bins.
    return table.index_select(0, bins).view(-1, *[1] * (x.dim() - 1))
