"""asym_w4a8: 4-bit codes of 16 uneven levels, an E4M3 scale per 16 values, a float32 scale per row; weights only.

The weight format of ComfyUI's `asym_w4a8_int8` (comfy-kitchen 0.2.40, tensor/w4a8_int8.py), whose kernels decode a
weight to int8 and multiply it with int8 activations (int8_row, int8.py).

Storage contract of x [N, K]:
    codes   uint8 [N, K]              index into CODEBOOK
    scales  float8_e4m3fn [N, K/16]   relative to the row's scale, 2^-6 .. 448
    row     float32 [N]
    x = clamp(round(CODEBOOK[code] * scale), -127, 127) * row

So the levels of a group are integers, unevenly spaced, and differ from those of a group with another scale by more
than a factor: a value is encoded to the nearest of its own group's levels, a tie to the lower one.

A file may name another codebook, or none, which stands for code - 8. We write this one always: comfy-kitchen's fast
CUDA path takes no other, and rotated weights are close to Gaussian, for which it is optimal.
"""

from collections.abc import Iterator
from functools import cache
from typing import Unpack

import torch
from torch import Tensor

from stepquant.errors import InvalidInput
from stepquant.formats.base import Format, ScaleOptions, Scales

# The 16 levels with the smallest squared error (Lloyd, Max) for Gaussian values over their group's largest magnitude.
CODEBOOK = (
    *(-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720),
    *(0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671),
)
_E4M3 = torch.finfo(torch.float8_e4m3fn)
_INT8_MAX = 127.0
PANEL = 2**20  # values that are rounded at a time
_SMALLEST_ROW = torch.finfo(torch.float32).tiny  # its reciprocal is finite


class AsymW4A8(Format):
    """Codebook elements with an E4M3 scale per group and a scale per row; the header of this file states the layout."""

    name = "asym_w4a8"
    group = 16
    code_bits = 4
    bits = 4 + 8 / 16
    scale_dtype = torch.float8_e4m3fn
    has_row_scale = True
    for_activations = False

    def tensor_scale(self, x: Tensor) -> None:
        """None: the scale per row takes its place."""
        return None

    def scales(self, x: Tensor, **options: Unpack[ScaleOptions]) -> Scales:
        """Scales of x [N, K]: the row's largest magnitude becomes 127, whatever the clip of its groups.

        Arguments and errors as in `Format.scales`.
        """
        self._check_options(options.get("tensor"), options.get("exponent_offset", 0))
        given = options.get("amax")
        amax = self.amax(x) if given is None else given
        row = (amax.amax(-1) / _INT8_MAX).clamp(min=_SMALLEST_ROW)
        group = amax * options.get("clip", 1.0) / row.unsqueeze(-1)
        return Scales(group.clamp(_E4M3.tiny, _E4M3.max).to(torch.float8_e4m3fn), None, row)

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        """Codes (uint8, 0..15) of x [N, K]: the nearest level of the group, a tie to the lower one, saturating."""
        codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        for rows in _panels(x):
            part = _rows_of(scales, rows)
            t, scale = self._in_rows(x[rows], part), self._scale(part)
            codes[rows] = _Neighbours(t / scale, t, scale).codes().flatten(-2)
        return codes

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """float32 values [N, K] of codes [N, K]."""
        levels = _levels(self._grouped(codes).int(), self._scale(scales))
        return levels.flatten(-2).mul_(_row(scales))

    def fake_quantize(self, x: Tensor, **options: Unpack[ScaleOptions]) -> Tensor:
        """x [N, K] rounded to the format; arguments and errors as in `Format.fake_quantize`."""
        scales = self.scales(x, **options)
        rounded = torch.empty_like(x)
        for rows in _panels(x):
            part = _rows_of(scales, rows)
            t, scale = self._in_rows(x[rows], part), self._scale(part)
            nearest = _Neighbours(t / scale, t, scale).nearest()
            rounded[rows] = nearest.flatten(-2).mul_(_row(part)).to(x.dtype)
        return rounded

    def round_to_grid(self, y: Tensor, scale: Tensor) -> Tensor:
        """y (float32, x / row / scale) rounded in place to the levels of its scale, of the shape of y."""
        return y.copy_(_Neighbours(y, y * scale, scale).nearest().div_(scale))

    def encode_scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        """uint8 codes of y, rounded as by `round_to_grid`."""
        return _Neighbours(y, y * scale, scale).codes()

    def _in_rows(self, x: Tensor, scales: Scales) -> Tensor:
        """x in units of its row's scale, float32 [N, K/16, 16]."""
        return self._grouped(x.float() / _row(scales))

    def _scales(self, amax: Tensor, exponent_offset: int | Tensor, rounding: str, tensor: Tensor | None) -> Scales:
        raise NotImplementedError("`scales` needs the magnitudes of the whole row before they are clipped")

    def _scale(self, scales: Scales) -> Tensor:
        return scales.group.float().unsqueeze(-1)

    def _reciprocal(self, scales: Scales) -> Tensor:
        return scales.group.float().reciprocal()

    def _from_codes(self, codes: Tensor) -> Tensor:
        raise NotImplementedError("a code has no value without its group's scale; see `decode`")


def _panels(x: Tensor) -> Iterator[slice]:
    """Ranges of rows of x [N, K], on which the temporaries of rounding, several times their size, stay small."""
    step = max(1, PANEL // x.shape[1])
    return (slice(start, start + step) for start in range(0, len(x), step))


def _rows_of(scales: Scales, rows: slice) -> Scales:
    return Scales(scales.group[rows], None, _row(scales)[rows].squeeze(-1))


class _Neighbours:
    """The three levels of a group that can be the nearest to each value.

    The code that is nearest before levels are rounded to integers is found first. Rounding moves a level by at most
    1/2, so that the nearest integer is the level of this code or of a neighbour. Beyond the outermost levels there is
    the same level again.
    """

    def __init__(self, y: Tensor, t: Tensor, scale: Tensor):
        """y: the values over row and group scale. t: over the row scale. scale: the group's, broadcastable to both."""
        codebook, midpoints, offsets = _tables(y.device)
        self.code = torch.bucketize(y, midpoints, out_int32=True)
        places = (self.code + offsets.view(3, *[1] * y.dim())).flatten()
        self.levels = _to_integers(codebook.index_select(0, places).view(3, *y.shape), scale)
        between = (self.levels[:2] + self.levels[1:]).mul_(0.5)
        self.place = (t > between).sum(0)  # 0: the level below, 1: that of the code, 2: the level above

    def nearest(self) -> Tensor:
        """The nearest level of each value, an integer as float32."""
        return self.levels.gather(0, self.place.unsqueeze(0)).squeeze(0)

    def codes(self) -> Tensor:
        """Its code, uint8."""
        return (self.code + self.place).sub_(1).clamp_(0, 15).to(torch.uint8)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The codebook with its ends doubled, the midpoints between its levels, and 0 to 2: constants, copied once."""
    levels = torch.tensor(CODEBOOK, device=device)
    padded = torch.cat([levels[:1], levels, levels[-1:]])
    return padded, (levels[1:] + levels[:-1]) / 2, torch.arange(3, dtype=torch.int32, device=device)


def _levels(codes: Tensor, scale: Tensor) -> Tensor:
    """The integers, as float32, that int32 codes stand for under a group's scale, broadcastable to codes."""
    codebook = torch.tensor(CODEBOOK, device=codes.device)
    return _to_integers(codebook.index_select(0, codes.flatten()).view(codes.shape), scale)


def _to_integers(levels: Tensor, scale: Tensor) -> Tensor:
    """Levels of the codebook in units of the row's scale, in place."""
    return levels.mul_(scale).round_().clamp_(-_INT8_MAX, _INT8_MAX)


def _row(scales: Scales) -> Tensor:
    """The scale of each row, [N, 1]."""
    if scales.row is None:
        raise InvalidInput("asym_w4a8 scales: the scale per row is missing; expected float32 [N]")
    return scales.row.unsqueeze(-1)
