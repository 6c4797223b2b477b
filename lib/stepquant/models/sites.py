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


# The linears of diffusers' WanTransformerBlock. to_k and to_v of attn2 read the text tokens.
WAN_SITES = (
    Site("attn1.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    Site("attn1.out", ("attn1.to_out.0",)),
    Site("attn2.q", ("attn2.to_q",)),
    Site("attn2.kv", ("attn2.to_k", "attn2.to_v"), depends_on_timestep=False),
    Site("attn2.out", ("attn2.to_out.0",)),
    Site("ffn.up", ("ffn.net.0.proj",)),
    Site("ffn.down", ("ffn.net.2",)),
)
