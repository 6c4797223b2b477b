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

    y = Q(rotate((x - mean) / smooth_factor); bin) (codes * wscales * wtscale * wcscales)^T
        + (x proj_down) proj_up^T + bias

Q rounds to "activation_format" with the clip of the bin. In the bins that "eight_bit_bins"[TARGET] lists, it rounds to
"eight_bit_format" instead, with the absmax of each group as it is (no clip_ratio, no clip_exponent). The tensors do not
depend on these lists.

rotate cuts the channels into groups of "rotations"[TARGET] neighbors and multiplies each group by the orthonormal
Hadamard matrix of that size, of the kind "hadamard" (quantize/rotate.py). A target that is not listed there has no
rotation. In asym_w4a8, codes * wscales is rounded to an integer in -127..127 before wcscales multiplies it.

All tensors are row-major, without fragment packing. Without mean, rotation and clip tables, the nvfp4 form equals the
SVDQuant contract of vLLM-Omni (docs.vllm.ai/projects/vllm-omni, "SVDQuant W4A4") but for the dtype of the bias; int4
and mxfp4 have the same form with their own scales. In self-attention, to_q, to_k and to_v have equal smooth_factor,
mean, rotation, proj_down and wtscale. Bin i holds bin_edges[i] >= t > bin_edges[i+1] (stepquant.models.bins).

quantization_config:

    quant_method         "stepquant"
    version              3. Versions 1 and 2 had other keys and are refused.
    weight_format        "int4", "mxfp4", "nvfp4" or "asym_w4a8"
    activation_format    "int4", "mxfp4", "nvfp4" or "int8_row", or null if activations stay unquantized
    activation_rounding  "floor" or "ceil": how the E8M0 scale of an activation group is rounded
    activation_scales    "absmax", or "error" (nvfp4 activations): of absmax / 6 and absmax / 4, the scale with the
                         smaller squared error of the group, times the clip; of equal errors the first
    rank                 R
    mean_subtraction     bool
    hadamard             "sylvester" or "regular": the kind of all rotations
    rotations            {module path: Hadamard size}
    bin_edges            B + 1 falling values of t
    targets              module paths of the quantized linears
    eight_bit_format     "int8" beside "int4" activations, "mxfp8" beside "mxfp4" and "nvfp4"; null if no bin takes it,
                         as always with "int8_row", which has 8 bits in every bin
    eight_bit_bins       {module path: rising indices of bins, at least one}; a target that is not listed takes
                         "activation_format" in every bin
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import torch

from stepquant.errors import InvalidInput, UnsupportedCheckpoint
from stepquant.formats import activation_formats, eight_bit_partner, get_format, weight_formats
from stepquant.quantize.activation_scales import check_scale_rule
from stepquant.quantize.rotate import REGULAR, SYLVESTER, is_hadamard_size

QUANT_METHOD = "stepquant"
VERSION = 3

ROUNDINGS = ("floor", "ceil")


@dataclass(frozen=True)
class QuantizationSettings:
    """The "quantization_config" of a denoiser; the header of this file describes each value.

    Raises:
        InvalidInput: if a value is not allowed.
    """

    weight_format: str
    activation_format: str | None
    activation_rounding: str
    activation_scales: str
    rank: int
    mean_subtraction: bool
    rotations: dict[str, int]
    bin_edges: tuple[float, ...]
    targets: tuple[str, ...]
    eight_bit_format: str | None = None
    eight_bit_bins: dict[str, tuple[int, ...]] = field(default_factory=dict)
    hadamard: str = SYLVESTER

    def __post_init__(self) -> None:
        if self.weight_format not in weight_formats():
            raise InvalidInput(f"weight_format is {self.weight_format!r}; allowed: {', '.join(weight_formats())}")
        if self.activation_format not in (None, *activation_formats()):
            raise InvalidInput(
                f"activation_format is {self.activation_format!r}; allowed: {', '.join(activation_formats())}, or null"
            )
        if self.activation_rounding not in ROUNDINGS:
            raise InvalidInput(f"activation_rounding is {self.activation_rounding!r}; allowed: {', '.join(ROUNDINGS)}")
        check_scale_rule(self.activation_scales, self.activation_format, "activation_scales")
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
        self._check_eight_bit_bins()
        self._check_eight_bit_format()

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

    def _check_eight_bit_bins(self) -> None:
        if not isinstance(self.eight_bit_bins, dict):
            raise InvalidInput(
                f"eight_bit_bins are {self.eight_bit_bins!r}; allowed: a list of bin indices by module path"
            )
        if foreign := sorted(map(str, set(self.eight_bit_bins) - set(self.targets))):
            raise InvalidInput(f"eight_bit_bins name {foreign[0]!r}, which is not in targets")
        for target, bins in self.eight_bit_bins.items():
            if not _are_rising_indices(bins, self.bins):
                raise InvalidInput(
                    f"eight_bit_bins of {target!r} are {_as_list(bins)!r}; allowed: rising indices of bins, at least "
                    f"one, of 0 to {self.bins - 1}"
                )

    def _check_eight_bit_format(self) -> None:
        if self.eight_bit_format is None:
            if self.eight_bit_bins:
                raise InvalidInput("eight_bit_bins has targets, but eight_bit_format is null; allowed: both or neither")
            return
        if self.activation_format is None:
            raise InvalidInput(
                f"eight_bit_format is {self.eight_bit_format!r}, but activation_format is null, so that activations "
                "stay unquantized; allowed: null"
            )
        narrow = get_format(self.activation_format)
        partner = eight_bit_partner(narrow).name
        if partner == narrow.name:
            raise InvalidInput(
                f"eight_bit_format is {self.eight_bit_format!r}, but {self.activation_format} activations have 8 bits "
                "in every bin; allowed: null"
            )
        if self.eight_bit_format != partner:
            raise InvalidInput(
                f"eight_bit_format is {self.eight_bit_format!r}; allowed beside {self.activation_format} activations: "
                f"{partner!r}, or null"
            )
        if not self.eight_bit_bins:
            raise InvalidInput(
                f"eight_bit_format is {partner!r}, but eight_bit_bins has no target; allowed: both or neither"
            )

    @property
    def bins(self) -> int:
        """Number of timestep bins."""
        return len(self.bin_edges) - 1

    def to_config(self) -> dict[str, Any]:
        """The content of "quantization_config", in JSON types."""
        values = asdict(self) | {"bin_edges": list(self.bin_edges), "targets": list(self.targets)}
        values["eight_bit_bins"] = {target: list(bins) for target, bins in self.eight_bit_bins.items()}
        return {"quant_method": QUANT_METHOD, "version": VERSION} | values

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "QuantizationSettings":
        """Read the content of "quantization_config".

        Raises:
            UnsupportedCheckpoint: if the method or the version is another one.
            InvalidInput: if a key is missing or unknown, or a value is not allowed.
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
        values |= {"bin_edges": tuple(values["bin_edges"]), "targets": tuple(values["targets"])}
        if isinstance(values["eight_bit_bins"], dict):
            values["eight_bit_bins"] = {target: _as_tuple(bins) for target, bins in values["eight_bit_bins"].items()}
        return cls(**values)


def _check_version(method: object, version: object) -> None:
    if method != QUANT_METHOD:
        raise UnsupportedCheckpoint(f"quantization_config: quant_method is {method!r}; allowed: {QUANT_METHOD!r}")
    if version in range(1, VERSION):
        raise UnsupportedCheckpoint(
            f"quantization_config: version is {version}, written by an older stepquant; this one reads version "
            f"{VERSION}: write the checkpoint again with stage pack (dvc repro)"
        )
    if version != VERSION:
        raise UnsupportedCheckpoint(
            f"quantization_config: version is {version!r}; this stepquant reads version {VERSION}: "
            "install the stepquant that wrote the checkpoint"
        )


def _as_tuple(bins: object) -> object:
    return tuple(bins) if isinstance(bins, list) else bins


def _as_list(bins: object) -> object:
    return list(bins) if isinstance(bins, tuple) else bins


def _are_rising_indices(bins: object, count: int) -> bool:
    if not isinstance(bins, tuple) or not bins or any(type(index) is not int for index in bins):
        return False
    return 0 <= bins[0] and bins[-1] < count and all(a < b for a, b in pairwise(bins))


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
