"""The quantized linear: 4-bit weights that stay packed, 4-bit activations, a low-rank branch, a clip per timestep bin.

Reference implementation: it computes what the layout in stepquant.runtime.layout defines, with the weight
dequantized in every forward and the activations quantized and dequantized. It saves memory, not time; an engine's
kernel that keeps both operands in 4 bits is an export target.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepquant.formats import Scales, check_groups, get_format, unpack_nibbles
from stepquant.quantize.rotate import check_rotation, rotate
from stepquant.runtime.layout import QuantizationSettings, linear_layout


class W4A4Linear(nn.Linear):
    """A drop-in for nn.Linear with the buffers of linear_layout and, if the linear had one, its bias.

    It is an nn.Linear so that libraries that look for linears (LoRA loaders) find it, but it has no `weight`.
    `bin` (int64 [1], not stored) selects the clip; stepquant.runtime.timestep sets it. Input and output have the dtype
    of x; scales, smoothing and rounding are computed in float32. Buffers are uninitialized until tensors are loaded.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, settings: QuantizationSettings, device, rotation: int = 0
    ):
        """settings say the formats, rank and bins; rotation is this linear's own. Raises UserError if a format's group or the
        rotation does not divide in_features."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate the float weight
        self.in_features = in_features
        self.out_features = out_features
        self.weight_format = get_format(settings.weight_format)
        self.activation_format = None if settings.activation_format is None else get_format(settings.activation_format)
        self.activation_rounding = settings.activation_rounding
        self.rank = settings.rank
        self.mean_subtraction = settings.mean_subtraction
        self.rotation = rotation
        check_rotation(rotation, in_features)
        for fmt in (self.weight_format, self.activation_format):
            if fmt is not None:
                check_groups(in_features, fmt, "linear input")
        for name, (shape, dtype) in linear_layout(settings, out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("bin", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)
        bias_values = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", bias_values)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        y = F.linear(self.quantized_input(x), self.dequantized_weight().to(x.dtype), self.bias)
        if self.rank > 0:
            y = y + F.linear(x @ self.proj_down.to(x.dtype), self.proj_up.to(x.dtype))
        return y

    def quantized_input(self, x: Tensor) -> Tensor:
        """The transformed x as the 4-bit GEMM sees it, with the clip of the current bin; x's shape and dtype."""
        x32 = x.float() - self.mean.float() if self.mean_subtraction else x.float()
        smoothed = rotate(x32 / self.smooth_factor.float(), self.rotation)
        if self.activation_format is None:
            return smoothed.to(x.dtype)
        # index_select by a tensor, not an int: torch.compile then has one graph for all bins.
        ratio = self.clip_ratio.index_select(0, self.bin)
        offset = self.clip_exponent.index_select(0, self.bin) if self.activation_format.name == "mxfp4" else 0
        rounded = self.activation_format.fake_quantize(
            smoothed, clip=ratio, exponent_offset=offset, rounding=self.activation_rounding
        )
        return rounded.to(x.dtype)

    def dequantized_weight(self) -> Tensor:
        """The 4-bit part of the weight, float32 [N, K]; it belongs to the smoothed input, the branch is not in it."""
        codes = unpack_nibbles(self.qweight.view(torch.uint8))
        if self.weight_format.name != "nvfp4":
            return self.weight_format.decode(codes, Scales(self.wscales.T, None))
        weight = self.weight_format.decode(codes, Scales(self.wscales.T, self.wtscale.float().squeeze()))
        return weight * self.wcscales.float().unsqueeze(1)

    def extra_repr(self) -> str:
        activation = self.activation_format.name if self.activation_format else "unquantized"
        return f"{super().extra_repr()}, weight={self.weight_format.name}, activation={activation}, rank={self.rank}, rotation={self.rotation}"
