"""Sites of a denoiser block: an input tensor and the linears that read it.

Statistics, smoothing and clip belong to a site. So q, k and v of self-attention are smoothed and factored as one group,
because engines fuse them into one GEMM with one smoothing factor and one low-rank down projection.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One input tensor of a block and the linears that read it.

    Attributes:
        name: name of the site, such as `attn1.qkv`.
        linears: module paths, inside the block, of the linears, in the order in which their rows are stacked.
        depends_on_timestep: False if the tensor is the same at every sampling step (text tokens), so that one clip is
            enough.
    """

    name: str
    linears: tuple[str, ...]
    depends_on_timestep: bool = True
