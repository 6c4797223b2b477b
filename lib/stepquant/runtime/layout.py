"""The on-disk layout of a quantized denoiser: this header is the contract, readers and writers follow it.

A checkpoint is a diffusers pipeline folder. In the folder of each expert (`transformer`, `transformer_2`):

    config.json                                     the source's, plus "quantization_config" (below)
    diffusion_pytorch_model.safetensors.index.json  key -> shard
    diffusion_pytorch_model-0000I-of-0000N.safetensors
                                                    one shard per block with the tensors below, then one with every
                                                    other tensor of the source, bit for bit

Each target linear `y = x W^T + b`, W [N, K], loses `TARGET.weight` and gets, with G the weight format's group,
R the rank and B the number of timestep bins:

    TARGET.qweight          int8  [N, K/2]   4-bit codes; the low nibble is the even column.
                                             int4: two's complement -8..7; mxfp4, nvfp4: E2M1, sign in the top bit
    TARGET.wscales                [K/G, N]   int4 (G 64): bfloat16; mxfp4 (G 32): uint8, E8M0 with bias 127;
                                             nvfp4 (G 16): float8_e4m3fn
    TARGET.wtscale          bf16  [1]        nvfp4 only: scale of the whole tensor
    TARGET.wcscales         bf16  [N]        nvfp4 only: scale per output channel
    TARGET.smooth_factor    bf16  [K]
    TARGET.mean             bf16  [K]        only if "mean_subtraction"; taken off the input of the 4-bit path
    TARGET.bias                   [N]        only if "mean_subtraction"; the source's b, in its dtype, plus what the mean contributes:
                                             mean W^T - (mean proj_down) proj_up^T
    TARGET.proj_down        bf16  [K, R]     absent if R = 0; fed by the raw x, not by x / smooth_factor
    TARGET.proj_up          bf16  [N, R]     absent if R = 0
    TARGET.clip_ratio       fp32  [B]        absent if activations stay unquantized; multiplies each group's absmax
    TARGET.clip_exponent    int8  [B]        mxfp4 activations only; added to their E8M0 exponent

    y = Q(rot((x - mean) / smooth_factor); clip of the bin) (codes * wscales * wtscale * wcscales)^T
        + (x proj_down) proj_up^T + bias

rot multiplies each run of "rotations"[TARGET] channels with the orthonormal Sylvester-Hadamard matrix of that order; a target
that is not listed there has none.

All row-major, no fragment packing. Without mean and rotation and up to the clip tables the nvfp4 form equals the SVDQuant contract of vLLM-Omni
(docs.vllm.ai/projects/vllm-omni, "SVDQuant W4A4"); int4 and mxfp4 are its twins. In self-attention to_q, to_k and to_v
share smooth_factor, mean, rotation, proj_down and wtscale. Bin i holds bin_edges[i] >= t > bin_edges[i+1] (stepquant.models.bins).

quantization_config: {"quant_method": "stepquant", "version": 1, "weight_format", "activation_format": name or null,
"activation_rounding": how an E8M0 activation scale is chosen, "rank", "mean_subtraction": bool, "rotations": {module path: block},
"bin_edges": [falling t], "targets": [module paths]}.
"""

from dataclasses import asdict, dataclass, fields

import torch

from stepquant.errors import UserError
from stepquant.formats import get_format

QUANT_METHOD = "stepquant"
VERSION = 1

ROUNDINGS = ("floor", "ceil")


@dataclass(frozen=True)
class QuantizationSettings:
    """What config.json says about a quantized denoiser. Raises UserError if a value is not allowed."""

    weight_format: str
    activation_format: str | None
    activation_rounding: str
    rank: int
    mean_subtraction: bool
    rotations: dict[str, int]
    bin_edges: tuple[float, ...]
    targets: tuple[str, ...]

    def __post_init__(self):
        get_format(self.weight_format)
        if self.activation_format is not None:
            get_format(self.activation_format)
        if self.activation_rounding not in ROUNDINGS:
            raise UserError(f"activation_rounding is {self.activation_rounding!r}; allowed: {', '.join(ROUNDINGS)}")
        if not isinstance(self.rank, int) or self.rank < 0:
            raise UserError(f"rank is {self.rank!r}; allowed: an integer of at least 0")
        if not isinstance(self.mean_subtraction, bool):
            raise UserError(f"mean_subtraction is {self.mean_subtraction!r}; allowed: true, false")
        if not isinstance(self.rotations, dict) or not all(_is_block(block) for block in self.rotations.values()):
            raise UserError(f"rotations are {self.rotations!r}; allowed: a power of two by module path")
        numbers = all(isinstance(edge, (int, float)) for edge in self.bin_edges)
        if len(self.bin_edges) < 2 or not numbers or any(a <= b for a, b in zip(self.bin_edges, self.bin_edges[1:])):
            raise UserError(f"bin_edges are {list(self.bin_edges)}; allowed: at least two falling values of t")
        names = all(isinstance(target, str) for target in self.targets)
        if not self.targets or not names or len(set(self.targets)) < len(self.targets):
            raise UserError("targets must be a list of module paths, at least one, none twice")
        if foreign := sorted(set(self.rotations) - set(self.targets)):
            raise UserError(f"rotations name {foreign[0]!r}, which is no target")

    @property
    def bins(self) -> int:
        return len(self.bin_edges) - 1

    def to_config(self) -> dict:
        """The content of config.json's "quantization_config", in JSON types."""
        values = asdict(self) | {"bin_edges": list(self.bin_edges), "targets": list(self.targets)}
        return {"quant_method": QUANT_METHOD, "version": VERSION} | values

    @classmethod
    def from_config(cls, config: dict) -> "QuantizationSettings":
        """Reads "quantization_config". Raises UserError for an unknown version, and missing, unknown or wrong values."""
        values = dict(config)
        method, version = values.pop("quant_method", None), values.pop("version", None)
        if method != QUANT_METHOD:
            raise UserError(f"quantization_config: quant_method is {method!r}; allowed: {QUANT_METHOD!r}")
        if version != VERSION:
            raise UserError(f"quantization_config: version is {version!r}; this stepquant reads version {VERSION}")
        known = {field.name for field in fields(cls)}
        if missing := sorted(known - set(values)):
            raise UserError(f"quantization_config: missing {', '.join(missing)}")
        if unknown := sorted(set(values) - known):
            raise UserError(f"quantization_config: unknown {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
        for key in ("bin_edges", "targets"):
            if not isinstance(values[key], (list, tuple)):
                raise UserError(f"quantization_config: {key} is {values[key]!r}; expected a list")
        return cls(**values | {"bin_edges": tuple(values["bin_edges"]), "targets": tuple(values["targets"])})


def _is_block(block: object) -> bool:
    return type(block) is int and block > 1 and block.bit_count() == 1


def linear_layout(settings: QuantizationSettings, N: int, K: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that a quantized [N, K] linear has in place of its weight, by name."""
    fmt = get_format(settings.weight_format)
    layout = {
        "qweight": ((N, K // 2), torch.int8),
        "wscales": ((K // fmt.group, N), fmt.scale_dtype),
        "smooth_factor": ((K,), torch.bfloat16),
    }
    if settings.mean_subtraction:
        layout |= {"mean": ((K,), torch.bfloat16)}
    if fmt.has_tensor_scale:
        layout |= {"wtscale": ((1,), torch.bfloat16), "wcscales": ((N,), torch.bfloat16)}
    if settings.rank > 0:
        layout |= {"proj_down": ((K, settings.rank), torch.bfloat16), "proj_up": ((N, settings.rank), torch.bfloat16)}
    if settings.activation_format is not None:
        layout |= {"clip_ratio": ((settings.bins,), torch.float32)}
    if settings.activation_format == "mxfp4":
        layout |= {"clip_exponent": ((settings.bins,), torch.int8)}
    return layout
