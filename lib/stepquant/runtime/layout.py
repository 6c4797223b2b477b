"""The on-disk layout of a quantized denoiser. This header is the contract that readers and writers follow.

A checkpoint is a diffusers pipeline folder. The folder of each expert (`transformer`, `transformer_2`) contains:

    config.json                                     that of the source, plus "quantization_config" (below)
    diffusion_pytorch_model.safetensors.index.json  key -> shard
    diffusion_pytorch_model-0000I-of-0000N.safetensors
                                                    one shard per block with the tensors below, then one with every
                                                    other tensor of the source, in the dtype in which it is computed
                                                    with (`stored_dtype` in stepquant.checkpoint.rest)

Each target linear y = x W^T + b with W [N, K] loses `TARGET.weight` and gets the tensors below. G is the group size of
the weight format, R the rank and B the number of timestep bins.

    TARGET.qweight          int8  [N, K/2]   4-bit codes; the low nibble is the even column.
                                             int4: two's complement -8..7; mxfp4, nvfp4: E2M1, sign in the top bit;
                                             asym_w4a8: index into the codebook of formats/asym_w4a8.py
    TARGET.wscales                [K/G, N]   int4 (G 64): bfloat16; mxfp4 (G 32): uint8, E8M0 with bias 127;
                                             nvfp4, asym_w4a8 (G 16): float8_e4m3fn
    TARGET.wtscale          bf16  [1]        nvfp4 only: scale of the whole tensor
    TARGET.wcscales         bf16  [N]        nvfp4: scale per output channel; asym_w4a8: the same in fp32, the row scale
    TARGET.smooth_factor    bf16  [K]
    TARGET.mean             bf16  [K]        with "mean_subtraction": subtracted from the input of the 4-bit path
    TARGET.bias             fp32  [N]        if the source has one, or with "mean_subtraction": the source's b plus the
                                             contribution of the mean, mean W^T - (mean proj_down) proj_up^T. It can be
                                             much larger than the output, so 16 bits are not enough
    TARGET.proj_down        bf16  [K, R]     if R > 0; applied to the raw x, not to x / smooth_factor
    TARGET.proj_up          bf16  [N, R]     if R > 0
    TARGET.clip_ratio       fp32  [B]        if activations are quantized; multiplies the absmax of each group
    TARGET.clip_exponent    int8  [B]        mxfp4 activations only; added to their E8M0 exponent

    y = Q(rotate((x - mean) / smooth_factor); clip of the bin) (codes * wscales * wtscale * wcscales)^T
        + (x proj_down) proj_up^T + bias

rotate cuts the channels into groups of "rotations"[TARGET] neighbors and multiplies each group by the orthonormal
Hadamard matrix of that size, of the kind "hadamard" (quantize/rotate.py). A target that is not listed there has no
rotation. In asym_w4a8, codes * wscales is rounded to an integer in -127..127 before wcscales multiplies it.

All tensors are row-major, without fragment packing. Without mean, rotation and clip tables, the nvfp4 form equals the
SVDQuant contract of vLLM-Omni (docs.vllm.ai/projects/vllm-omni, "SVDQuant W4A4") but for the dtype of the bias; int4
and mxfp4 have the same form with their own scales. In self-attention, to_q, to_k and to_v have equal smooth_factor,
mean, rotation, proj_down and wtscale. Bin i holds bin_edges[i] >= t > bin_edges[i+1] (stepquant.models.bins).

quantization_config:

    quant_method         "stepquant"
    version              2. Version 1 had other keys and is refused.
    weight_format        "int4", "mxfp4", "nvfp4" or "asym_w4a8"
    activation_format    "int4", "mxfp4", "nvfp4" or "int8_row", or null if activations stay unquantized
    activation_rounding  "floor" or "ceil": how the E8M0 scale of an activation group is rounded
    rank                 R
    mean_subtraction     bool
    hadamard             "sylvester" or "regular"
    rotations            {module path: Hadamard size}
    bin_edges            B + 1 falling values of t
    targets              module paths of the quantized linears
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch

from stepquant.errors import InvalidInput, UnsupportedCheckpoint
from stepquant.formats import get_format
from stepquant.quantize.rotate import REGULAR, SYLVESTER, is_hadamard_size

QUANT_METHOD = "stepquant"
VERSION = 2

ROUNDINGS = ("floor", "ceil")


@dataclass(frozen=True)
class QuantizationSettings:
    """The "quantization_config" of a denoiser; the header of this file describes each value.

    Raises:
        InvalidInput: if a value is not allowed.
        UserError: if a format does not exist.
    """

    weight_format: str
    activation_format: str | None
    activation_rounding: str
    rank: int
    mean_subtraction: bool
    rotations: dict[str, int]
    bin_edges: tuple[float, ...]
    targets: tuple[str, ...]
    hadamard: str = SYLVESTER

    def __post_init__(self) -> None:
        if not get_format(self.weight_format).for_weights:
            raise InvalidInput(f"weight_format is {self.weight_format!r}, a format of activations alone")
        if self.activation_format is not None and not get_format(self.activation_format).for_activations:
            raise InvalidInput(f"activation_format is {self.activation_format!r}, a format of weights alone")
        if self.activation_rounding not in ROUNDINGS:
            raise InvalidInput(f"activation_rounding is {self.activation_rounding!r}; allowed: {', '.join(ROUNDINGS)}")
        if not isinstance(self.rank, int) or self.rank < 0:
            raise InvalidInput(f"rank is {self.rank!r}; allowed: an integer of at least 0")
        if not isinstance(self.mean_subtraction, bool):
            raise InvalidInput(f"mean_subtraction is {self.mean_subtraction!r}; allowed: true, false")
        numbers = all(isinstance(edge, (int, float)) for edge in self.bin_edges)
        if len(self.bin_edges) < 2 or not numbers or any(a <= b for a, b in pairwise(self.bin_edges)):
            raise InvalidInput(f"bin_edges are {list(self.bin_edges)}; allowed: at least two falling values of t")
        names = all(isinstance(target, str) for target in self.targets)
        if not self.targets or not names or len(set(self.targets)) < len(self.targets):
            raise InvalidInput("targets must be a list of module paths, at least one, none twice")
        self._check_rotations()

    def _check_rotations(self) -> None:
        if self.hadamard not in (SYLVESTER, REGULAR):
            raise InvalidInput(f"hadamard is {self.hadamard!r}; allowed: {SYLVESTER}, {REGULAR}")
        sizes = self.rotations.values() if isinstance(self.rotations, dict) else [None]
        if not all(type(size) is int and size > 1 and is_hadamard_size(size, self.hadamard) for size in sizes):
            power = "two" if self.hadamard == SYLVESTER else "four"
            raise InvalidInput(
                f"rotations are {self.rotations!r}; allowed: a Hadamard size, which is a power of {power}, by module "
                "path"
            )
        if foreign := sorted(set(self.rotations) - set(self.targets)):
            raise InvalidInput(f"rotations name {foreign[0]!r}, which is not in targets")

    @property
    def bins(self) -> int:
        """Number of timestep bins."""
        return len(self.bin_edges) - 1

    def to_config(self) -> dict[str, Any]:
        """The content of "quantization_config", in JSON types."""
        values = asdict(self) | {"bin_edges": list(self.bin_edges), "targets": list(self.targets)}
        return {"quant_method": QUANT_METHOD, "version": VERSION} | values

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "QuantizationSettings":
        """Read the content of "quantization_config".

        Raises:
            UnsupportedCheckpoint: if the method or the version is another one.
            InvalidInput: if a key is missing or unknown, or a value is not allowed.
            UserError: if a format does not exist.
        """
        values = dict(config)
        _check_version(values.pop("quant_method", None), values.pop("version", None))
        known = {field.name for field in fields(cls)}
        if missing := sorted(known - set(values)):
            raise InvalidInput(f"quantization_config: missing {', '.join(missing)}")
        if unknown := sorted(set(values) - known):
            raise InvalidInput(
                f"quantization_config: unknown {', '.join(unknown)}; allowed: {', '.join(sorted(known))}"
            )
        for key in ("bin_edges", "targets"):
            if not isinstance(values[key], (list, tuple)):
                raise InvalidInput(f"quantization_config: {key} is {values[key]!r}; expected a list")
        return cls(**values | {"bin_edges": tuple(values["bin_edges"]), "targets": tuple(values["targets"])})


def _check_version(method: object, version: object) -> None:
    if method != QUANT_METHOD:
        raise UnsupportedCheckpoint(f"quantization_config: quant_method is {method!r}; allowed: {QUANT_METHOD!r}")
    if version == 1:
        raise UnsupportedCheckpoint(
            f"quantization_config: version is 1, written by an older stepquant; this one reads version {VERSION}: "
            "write the checkpoint again with stage pack (dvc repro)"
        )
    if version != VERSION:
        raise UnsupportedCheckpoint(
            f"quantization_config: version is {version!r}; this stepquant reads version {VERSION}: "
            "install the stepquant that wrote the checkpoint"
        )


def linear_layout(settings: QuantizationSettings, N: int, K: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype, by name, of the tensors that a quantized [N, K] linear has in place of its weight.

    The bias is not among them. It is always float32.
    """
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
    if fmt.has_row_scale:
        layout |= {"wcscales": ((N,), torch.float32)}
    if settings.rank > 0:
        layout |= {"proj_down": ((K, settings.rank), torch.bfloat16), "proj_up": ((N, settings.rank), torch.bfloat16)}
    if settings.activation_format is not None:
        layout |= {"clip_ratio": ((settings.bins,), torch.float32)}
    if settings.activation_format == "mxfp4":
        layout |= {"clip_exponent": ((settings.bins,), torch.int8)}
    return layout
