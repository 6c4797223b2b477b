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

import torch
from torch import Tensor

from stepquant.quantize.lowrank import residual
from stepquant.quantize.rotate import rotate


@dataclass(frozen=True)
class InputTransform:
    """The transform of a site's input.

    Attributes:
        smooth: Smoothing factor, bfloat16 [K].
        mean: The mean that is subtracted, bfloat16 [K]; zeros without mean subtraction.
        rotation: Hadamard size; 0 is no rotation.
    """

    smooth: Tensor
    mean: Tensor
    rotation: int

    @classmethod
    def smoothing(cls, smooth: Tensor) -> "InputTransform":
        """Smoothing alone."""
        return cls(smooth, torch.zeros_like(smooth), 0)

    def apply(self, x: Tensor) -> Tensor:
        """The transformed input before rounding: float32 [T, K] for x [T, K] of any float dtype."""
        return rotate((x.float() - self.mean.float()) / self.smooth.float(), self.rotation)

    def hessian(self, H: Tensor) -> Tensor:
        """Hessian [K, K] of `apply(x)`, from the Hessian [K, K] of x - mean."""
        s = self.smooth.float()
        H = H.float() / s[:, None]
        H /= s
        return rotate(rotate(H, self.rotation).T, self.rotation)

    def weight(self, W: Tensor) -> Tensor:
        """The weight [N, K] that belongs to the transformed input, float32."""
        return rotate(W.float() * self.smooth.float(), self.rotation)

    def residual(self, W: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
        """The part of W [N, K] that the 4-bit codes represent, float32 [N, K]; the branch as stored (lowrank.py)."""
        return rotate(residual(W, self.smooth, proj_down, proj_up), self.rotation)

    def offset(self, W: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
        """The mean's contribution to the output, float32 [N]: mean @ (W - branch).T."""
        mean = self.mean.float()
        return mean @ W.float().T - (mean @ proj_down.float()) @ proj_up.float().T
