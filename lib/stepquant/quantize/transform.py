"""What is done to a layer's input before it is rounded to 4 bits, and what that does to the weight.

    x @ W.T = rotate((x - mean) / smooth) @ rotate((W - branch) * smooth).T + x @ branch.T + mean @ (W - branch).T

Three steps, each exact without rounding, each there to make rounding cheaper:

    mean      AdaLN gives channels a mean that all tokens share; it costs range and carries nothing. What it contributes to
              the output is a constant, which the layer's bias takes. One mean for all timestep bins is as good as one per
              bin (docs/recipe.md has the numbers of all three).
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
    """smooth bfloat16 [K]; mean bfloat16 [K], zeros where nothing is taken off; rotation: block size, 0 is none."""

    smooth: Tensor
    mean: Tensor
    rotation: int

    @classmethod
    def smoothing(cls, smooth: Tensor) -> "InputTransform":
        """Smoothing alone."""
        return cls(smooth, torch.zeros_like(smooth), 0)

    def apply(self, x: Tensor) -> Tensor:
        """What the 4-bit GEMM is given, before rounding: float32 [T, K] for x [T, K] of any floating dtype."""
        return rotate((x.float() - self.mean.float()) / self.smooth.float(), self.rotation)

    def hessian(self, H: Tensor) -> Tensor:
        """Second moments [K, K] of `apply(x)`, from those of x - mean."""
        s = self.smooth.float()
        H = H.float() / s[:, None]
        H /= s
        return rotate(rotate(H, self.rotation).T, self.rotation)

    def weight(self, W: Tensor) -> Tensor:
        """What the transform makes of a weight [N, K], float32."""
        return rotate(W.float() * self.smooth.float(), self.rotation)

    def residual(self, W: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
        """What is left of W [N, K] for the 4-bit codes, float32 [N, K]; the branch as stored (lowrank.py)."""
        return rotate(residual(W, self.smooth, proj_down, proj_up), self.rotation)

    def offset(self, W: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
        """What the mean contributes to the output, float32 [N]: mean @ (W - branch).T."""
        mean = self.mean.float()
        return mean @ W.float().T - (mean @ proj_down.float()) @ proj_up.float().T
