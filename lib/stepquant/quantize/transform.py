"""What is applied to a layer's input before it is rounded to 4 bits, and the matching change of the weight.

    x @ W.T = rotate((x - mean) / smooth) @ rotate((W - branch) * smooth).T + x @ branch.T + mean @ (W - branch).T

Each of the three parts is exact without rounding and makes rounding cheaper:

    mean      AdaLN gives channels a mean that all tokens have in common; it wastes dynamic range and carries no
              information. Its contribution to the output is a constant, which is added to the layer's bias. One mean
              for all timestep bins is as good as one per bin. Without mean subtraction the W4A4 error of the demo's
              sites is 2.3 to 2.9 % larger (docs/experiments/recipe-ablations.md).
    smooth    SVDQuant's smoothing factor (smooth.py).
    rotation  a block-Hadamard rotation (rotate.py).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stepquant.quantize.lowrank import residual
from stepquant.quantize.rotate import SYLVESTER, check_rotation, hadamard, rotate_by


@dataclass(frozen=True)
class InputTransform:
    """The transform of a site's input.

    Attributes:
        smooth: Smoothing factor, bfloat16 [K].
        mean: The mean that is subtracted, bfloat16 [K]; zeros without mean subtraction.
        rotation: Hadamard size; 0 is no rotation.
        hadamard: The kind of the Hadamard matrix (rotate.py).
    """

    smooth: Tensor
    mean: Tensor
    rotation: int
    hadamard: str = SYLVESTER

    @classmethod
    def smoothing(cls, smooth: Tensor) -> "InputTransform":
        """Smoothing alone."""
        return cls(smooth, torch.zeros_like(smooth), 0)

    @cached_property
    def _matrix(self) -> Tensor:
        """The rotation, float32 on the transform's device; built on first use."""
        return hadamard(self.rotation, self.hadamard, device=self.smooth.device)

    def rotate(self, x: Tensor) -> Tensor:
        """x float32 [..., K] with the rotation alone applied, which is its own inverse. Raises as `check_rotation`."""
        check_rotation(self.rotation, x.shape[-1], kind=self.hadamard)
        return rotate_by(x, self._matrix) if self.rotation else x

    def apply(self, x: Tensor) -> Tensor:
        """The transformed input before rounding: float32 [T, K] for x [T, K] of any float dtype."""
        check_rotation(self.rotation, x.shape[-1], kind=self.hadamard)
        return transform_input(x, self.smooth, self.mean, self._matrix if self.rotation else None)

    def hessian(self, H: Tensor) -> Tensor:
        """Hessian [K, K] of `apply(x)`, from the Hessian [K, K] of x - mean."""
        s = self.smooth.float()
        H = H.float() / s[:, None]
        H /= s
        return self.rotate(self.rotate(H).T)

    def weight(self, W: Tensor) -> Tensor:
        """The weight [N, K] that belongs to the transformed input, float32."""
        return self.rotate(W.float() * self.smooth.float())

    def residual(self, W: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
        """The part of W [N, K] that the 4-bit codes represent, float32 [N, K]; the branch as stored (lowrank.py)."""
        return self.rotate(residual(W, self.smooth, proj_down, proj_up))

    def offset(self, W: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
        """The mean's contribution to the output, float32 [N]: mean @ (W - branch).T."""
        mean = self.mean.float()
        return mean @ W.float().T - (mean @ proj_down.float()) @ proj_up.float().T


def transform_input(x: Tensor, smooth: Tensor, mean: Tensor | None, matrix: Tensor | None) -> Tensor:
    """rotate((x - mean) / smooth), computed in float32.

    Args:
        x: Raw input [..., K] of any float dtype.
        smooth: Smoothing factor [K].
        mean: What is subtracted, [K]; None subtracts nothing.
        matrix: Rotation matrix, float32, from `hadamard`; None does not rotate.

    Returns:
        float32 [..., K].
    """
    z = x.float() if mean is None else x.float() - mean.float()
    z = z / smooth.float()
    return z if matrix is None else rotate_by(z, matrix)
