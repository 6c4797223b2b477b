"""What the formats have in common: the scale record, the Format interface, and the checks of their inputs.

Storage contract of every format: a tensor x [..., K] is divided along its last dimension into K/g groups of g adjacent
values. Each value is stored as one code of 4 or 8 bits, each group as one scale; a value is element(code) * scale,
where scale is the real value of the group's scale. Codes are uint8 [..., K], 0..15 or 0..255; `pack_nibbles` puts two
4-bit codes into a byte.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypedDict, Unpack

import torch
from torch import Tensor

from stepquant.errors import InvalidInput


@dataclass(frozen=True)
class Scales:
    """Scales of a tensor [..., K] as they are stored.

    Attributes:
        group: [..., K/g] in the format's own dtype (int4 and int8 bfloat16, int8_row float32, mxfp4 and mxfp8 uint8
            that holds E8M0, nvfp4 and asym_w4a8 float8_e4m3fn).
        tensor: float32 scalar [] that multiplies every group scale; nvfp4 only, None in the other formats.
        row: float32 [N], one for each row of a weight [N, K]; asym_w4a8 only, None in the other formats.
    """

    group: Tensor
    tensor: Tensor | None
    row: Tensor | None = None


class ScaleOptions(TypedDict, total=False):
    """Keyword arguments of `Format.scales` and `Format.fake_quantize`, all optional.

    clip: multiplies each group's largest magnitude; a float or a tensor broadcastable to [..., K/g]. Default 1.
    exponent_offset: added to the E8M0 exponent; an int or an integer tensor broadcastable to [..., K/g]. mxfp4
        and mxfp8 only.
    rounding: how these turn the magnitude into a power of two, "floor" or "ceil" (default). Other formats ignore it.
    tensor: the per-tensor scale, float32 []; nvfp4 only, where None means 1.
    amax: the largest magnitudes from `Format.amax`, if they are known already.
    """

    clip: float | Tensor
    exponent_offset: int | Tensor
    rounding: str
    tensor: Tensor | None
    amax: Tensor | None


class Format(ABC):
    """A number format with one scale per group. Instances hold no state; `get_format` returns one by name.

    Attributes:
        name: as in params.yaml and in a checkpoint.
        group: number of adjacent values that have one scale in common; 0 is all of a row.
        code_bits: bits of a code, 4 or 8. Weights are stored in the formats of 4.
        bits: storage per value, group scale included.
        scale_dtype: dtype of a stored group scale.
        has_tensor_scale: whether one more scale multiplies the whole tensor.
        has_row_scale: whether one more scale multiplies each row of a weight.
        for_activations: whether activations can be rounded to it.
        has_exponent_scale: whether a group scale is a power of two, whose exponent can be offset.
    """

    name: ClassVar[str]
    group: ClassVar[int]
    code_bits: ClassVar[int]
    bits: ClassVar[float]
    scale_dtype: ClassVar[torch.dtype]
    has_tensor_scale: ClassVar[bool] = False
    has_row_scale: ClassVar[bool] = False
    has_exponent_scale: ClassVar[bool] = False
    for_activations: ClassVar[bool] = True

    def scales(self, x: Tensor, **options: Unpack[ScaleOptions]) -> Scales:
        """Scales of x from the largest magnitude of each group.

        Args:
            x: [..., K] of any float dtype. It must be finite (`check_finite`); this is not tested here, because the
                runtime calls this function for every activation.
            **options: as in `ScaleOptions`.

        Raises:
            InvalidInput: The group size does not divide K, or an option is one that this format does not have.
        """
        tensor, exponent_offset = options.get("tensor"), options.get("exponent_offset", 0)
        self._check_options(tensor, exponent_offset)
        amax = options.get("amax")
        amax = (self.amax(x) if amax is None else amax) * options.get("clip", 1.0)
        return self._scales(amax, exponent_offset, options.get("rounding", "ceil"), tensor)

    @abstractmethod
    def tensor_scale(self, x: Tensor) -> Tensor | None:
        """The per-tensor scale for x, float32 [], or None where the format has none."""

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        """Codes (uint8, below 2^code_bits) of x [..., K]: round to nearest, ties to the even code, saturating."""
        return self.encode_scaled(self._divide(self._grouped(x.float()), scales), self._scale(scales)).flatten(-2)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """float32 values [..., K] of codes [..., K]."""
        values = self._from_codes(self._grouped(codes))
        return values.mul_(self._scale(scales)).flatten(-2)

    def scale_and_reciprocal(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """Real value of each group's scale and its reciprocal, float32 in the shape of scales.group.

        With `round_to_grid` and `encode_scaled` they allow rounding column by column, where `encode` would compute the
        same scales again: x is rounded to round_to_grid(x * reciprocal, scale) * scale. In a format with a scale per
        row both, and x, are in units of it.
        """
        return self._scale(scales).squeeze(-1), self._reciprocal(scales)

    def fake_quantize(self, x: Tensor, **options: Unpack[ScaleOptions]) -> Tensor:
        """x rounded to the format: decode(encode(x)) without the codes.

        Args:
            x: [..., K] of any float dtype.
            **options: as in `ScaleOptions`.

        Returns:
            The rounded values, in the shape and dtype of x.

        Raises:
            InvalidInput: As `scales`.
        """
        x32 = x.float()  # converted once, for the scales and for the values
        scales = self.scales(x32, **options)
        scale = self._scale(scales)
        rounded = self.round_to_grid(self._divide(self._grouped(x32), scales), scale)
        return rounded.mul_(scale).flatten(-2).to(x.dtype)

    @abstractmethod
    def round_to_grid(self, y: Tensor, scale: Tensor) -> Tensor:
        """Rounds y (float32, divided by its scale) in place to the element grid and returns it.

        To nearest, ties to the even code, saturating. scale, broadcastable to y, matters to asym_w4a8 alone, whose
        grid depends on it.
        """

    @abstractmethod
    def encode_scaled(self, y: Tensor, scale: Tensor) -> Tensor:
        """uint8 codes of y (float32, divided by its scale), rounded as by `round_to_grid`; may overwrite y."""

    def amax(self, x: Tensor) -> Tensor:
        """Largest magnitude of each group, float32 [..., K/g]."""
        magnitudes = self._grouped(x.float()).abs()
        if 0 < self.group < 32:
            # torch's CPU reduction is slow over so few values: halve the group element by element first.
            magnitudes = torch.maximum(magnitudes[..., : self.group // 2], magnitudes[..., self.group // 2 :])
        return magnitudes.amax(-1)

    def _check_options(self, tensor: Tensor | None, exponent_offset: int | Tensor) -> None:
        """Raises InvalidInput for an option that this format does not have."""
        if tensor is not None and not self.has_tensor_scale:
            raise InvalidInput(f"per-tensor scale: {self.name} has none; allowed: None")
        if not self.has_exponent_scale and (isinstance(exponent_offset, Tensor) or exponent_offset != 0):
            raise InvalidInput(f"exponent offset {exponent_offset}: {self.name} has no exponent scale; allowed: 0")

    def _grouped(self, x: Tensor) -> Tensor:
        """x [..., K] as [..., K/g, g]."""
        check_groups(x.shape[-1], self, "tensor")
        return torch.unflatten(x, -1, (-1, self.group or x.shape[-1]))

    @abstractmethod
    def _scales(self, amax: Tensor, exponent_offset: int | Tensor, rounding: str, tensor: Tensor | None) -> Scales:
        """Scales from the clipped magnitudes of the groups [..., K/g]; the other arguments are checked already."""

    @abstractmethod
    def _scale(self, scales: Scales) -> Tensor:
        """Real value of each group's scale, float32 [..., K/g, 1]."""

    @abstractmethod
    def _reciprocal(self, scales: Scales) -> Tensor:
        """Reciprocal of each group's scale, float32 [..., K/g]."""

    def _divide(self, groups: Tensor, scales: Scales) -> Tensor:
        """groups (float32 [..., K/g, g]) divided by their scales, a new tensor."""
        return groups * self._reciprocal(scales).unsqueeze(-1)

    @abstractmethod
    def _from_codes(self, codes: Tensor) -> Tensor:
        """Element values of codes, float32, a new tensor."""


def check_groups(K: int, fmt: Format, what: str) -> None:
    """Raises InvalidInput, with the name `what`, unless fmt's group size divides K channels."""
    if fmt.group and K % fmt.group:
        raise InvalidInput(
            f"{what}: {K} channels cannot be divided into {fmt.name} groups; allowed: a multiple of {fmt.group}"
        )


def check_finite(x: Tensor, what: str) -> None:
    """Raises InvalidInput, with the name `what`, if x holds a NaN or an infinity."""
    # The sum is many times faster than isfinite of every value, and is finite only if all values are. Large finite
    # values may overflow it, so only a non-finite sum needs the full test.
    if torch.isfinite(x.sum()):
        return
    finite = torch.isfinite(x)
    if not finite.all():
        bad = int(x.numel() - finite.sum())
        first = tuple((~finite).nonzero()[0].tolist())
        raise InvalidInput(
            f"{what}: {bad} of {x.numel()} values are NaN or infinite, the first at index {first}; "
            "allowed: finite numbers"
        )
