"""What the 4-bit formats share: the scale record, the Format interface, and the checks of their inputs.

Storage contract of every format: a tensor x [..., K] is cut along its last dimension into K/g groups of g neighbours.
Each value becomes one 4-bit code, each group one scale; a value is worth element(code) * step, where step is the real
value of its group's scale. Codes are uint8 [..., K] (0..15) until `pack_nibbles` puts two into a byte.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepquant.errors import UserError


@dataclass(frozen=True)
class Scales:
    """Scales of a tensor [..., K] as they are stored.

    group: [..., K/g] in the format's own dtype (int4 bfloat16, mxfp4 uint8 holding E8M0, nvfp4 float8_e4m3fn).
    tensor: float32 scalar [] that multiplies every group scale; nvfp4 only, None elsewhere.
    """

    group: Tensor
    tensor: Tensor | None


class Format(ABC):
    """A 4-bit number format with one scale per group. Instances hold no state; get one with `get_format`.

    name: as in params.yaml. group: values that share a scale. bits: storage per value, group scale included. scale_dtype: of a
    stored group scale. has_tensor_scale: whether one more scale multiplies the whole tensor.
    """

    name: ClassVar[str]
    group: ClassVar[int]
    bits: ClassVar[float]
    scale_dtype: ClassVar[torch.dtype]
    has_tensor_scale: ClassVar[bool] = False

    @abstractmethod
    def scales(
        self,
        x: Tensor,
        *,
        clip: float | Tensor = 1.0,
        exponent_offset: int | Tensor = 0,
        rounding: str = "ceil",
        tensor: Tensor | None = None,
        amax: Tensor | None = None,
    ) -> Scales:
        """Scales of x [..., K] (any float dtype) from the largest magnitude of each group.

        clip: multiplies each group's largest magnitude; a float or a tensor broadcastable to [..., K/g].
        exponent_offset: added to the E8M0 exponent; int or integer tensor broadcastable to [..., K/g]; mxfp4 only.
        rounding: how mxfp4 turns the magnitude into a power of two, "floor" or "ceil"; the others have no choice.
        tensor: per-tensor scale, float32 []; nvfp4 only, where None means 1.
        amax: the largest magnitudes, where they are known already; `amax` gives them.
        Raises UserError if the group does not divide K, or an argument is not one this format has. x must be finite
        (`check_finite`); that is not tested here because the runtime calls this for every activation.
        """

    @abstractmethod
    def tensor_scale(self, x: Tensor) -> Tensor | None:
        """The per-tensor scale that suits x, float32 [], or None where the format has none."""

    def encode(self, x: Tensor, scales: Scales) -> Tensor:
        """Codes (uint8, 0..15) of x [..., K]: round to nearest, ties to the even code, saturating."""
        return self.encode_scaled(self._divide(self._grouped(x.float()), scales)).flatten(-2)

    def decode(self, codes: Tensor, scales: Scales) -> Tensor:
        """float32 values [..., K] of codes [..., K]."""
        values = self._from_codes(self._grouped(codes))
        return values.mul_(self._scale(scales)).flatten(-2)

    def scale_and_reciprocal(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """Real value of one unit of the element grid and its inverse, float32 in the shape of scales.group.

        With `round_to_grid` and `encode_scaled` for rounding column by column, where `encode` would work out the same scales anew:
        for x in the units of its group, x is rounded to round_to_grid(x * inverse) * step.
        """
        return self._scale(scales).squeeze(-1), self._reciprocal(scales)

    def fake_quantize(
        self,
        x: Tensor,
        *,
        clip: float | Tensor = 1.0,
        exponent_offset: int | Tensor = 0,
        rounding: str = "ceil",
        tensor: Tensor | None = None,
        amax: Tensor | None = None,
    ) -> Tensor:
        """x [..., K] rounded to the format, in x's dtype: decode(encode(x)) without forming codes.

        Arguments and errors as in `scales`.
        """
        x32 = x.float()  # once, for the scales and the values
        scales = self.scales(
            x32, clip=clip, exponent_offset=exponent_offset, rounding=rounding, tensor=tensor, amax=amax
        )
        rounded = self.round_to_grid(self._divide(self._grouped(x32), scales))
        return rounded.mul_(self._scale(scales)).flatten(-2).to(x.dtype)

    @abstractmethod
    def round_to_grid(self, y: Tensor) -> Tensor:
        """y (float32, in units of the step) on the element grid: to nearest, ties to the even code, saturating; may overwrite y."""

    @abstractmethod
    def encode_scaled(self, y: Tensor) -> Tensor:
        """uint8 codes of y, rounded as by `round_to_grid`; may overwrite y."""

    def _grouped(self, x: Tensor) -> Tensor:
        """x [..., K] as [..., K/g, g]."""
        check_groups(x.shape[-1], self, "tensor")
        return x.unflatten(-1, (-1, self.group))

    def amax(self, x: Tensor) -> Tensor:
        """Largest magnitude of each group, float32 [..., K/g]."""
        magnitudes = self._grouped(x.float()).abs()
        if self.group < 32:  # torch's CPU reduction is slow over so few neighbours: halve them element by element first
            magnitudes = torch.maximum(magnitudes[..., : self.group // 2], magnitudes[..., self.group // 2 :])
        return magnitudes.amax(-1)

    @abstractmethod
    def _scale(self, scales: Scales) -> Tensor:
        """Real value of one unit of the element grid, float32 [..., K/g, 1]."""

    @abstractmethod
    def _reciprocal(self, scales: Scales) -> Tensor:
        """One over the step, float32 [..., K/g]."""

    def _divide(self, groups: Tensor, scales: Scales) -> Tensor:
        """groups (float32 [..., K/g, g]) in units of their step, a new tensor."""
        return groups * self._reciprocal(scales).unsqueeze(-1)

    @abstractmethod
    def _from_codes(self, codes: Tensor) -> Tensor:
        """Element values of codes, float32, a new tensor."""


def check_groups(K: int, fmt: Format, what: str) -> None:
    """Raises UserError naming `what` unless fmt's group divides its K channels."""
    if K % fmt.group:
        raise UserError(
            f"{what}: {K} channels cannot be cut into {fmt.name} groups; allowed: a multiple of {fmt.group}"
        )


def check_finite(x: Tensor, what: str) -> None:
    """Raises UserError naming `what` if x holds a NaN or an infinity."""
    if torch.isfinite(
        x.sum()
    ):  # a sum is many times quicker, and finite only if every value is; large values may overflow it
        return
    finite = torch.isfinite(x)
    if not finite.all():
        bad = int(x.numel() - finite.sum())
        first = tuple((~finite).nonzero()[0].tolist())
        raise UserError(
            f"{what}: {bad} of {x.numel()} values are NaN or infinite, the first at index {first}; "
            "allowed: finite numbers"
        )


def check_no_offset(fmt: Format, exponent_offset: int | Tensor) -> None:
    """Raises UserError if a caller hands an exponent offset to fmt, a format whose scale is no power of two."""
    if isinstance(exponent_offset, Tensor) or exponent_offset != 0:
        raise UserError(f"exponent offset {exponent_offset}: {fmt.name} has no exponent scale; allowed: 0")


def check_no_tensor_scale(fmt: Format, tensor: Tensor | None) -> None:
    """Raises UserError if a caller hands a per-tensor scale to fmt, a format without one."""
    if tensor is not None:
        raise UserError(f"per-tensor scale: {fmt.name} has none; allowed: None")
