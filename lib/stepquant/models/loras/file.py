"""Reads a LoRA file: what it adds to which tensor of a denoiser.

Names of modules: those of diffusers and PEFT, Wan-Video's own, and either with underscores for dots (kohya). Parts of a
module: a low-rank pair (lora_down and lora_up, or lora_A and lora_B) with an alpha, or whole differences of weight
(diff) and bias (diff_b, or the bias of lora_B). Every key must have a place; a file that fits only in part is refused,
because a LoRA that is fused by half gives another model and no error.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from safetensors import safe_open
from torch import Tensor

from stepquant.errors import InvalidInput, MissingFile, UnsupportedCheckpoint
from stepquant.models.loras.config import config_scale, read_config
from stepquant.models.loras.fused_weights import Difference, LowRankUpdate, Update
from stepquant.models.native_names import module_spellings
from stepquant.models.weights import TensorInfo, Weights, read_header

_PREFIX = re.compile(
    r"(base_model\.model\.)?(model\.diffusion_model\.|diffusion_model\.|transformer\.|pipe\.dit\.|lora_unet_|"
    r"lora_transformer_)?"
)
_PART = re.compile(
    r"(?P<module>.+?)\.("
    r"(?P<down>(lora_down|lora_A|lora\.down)(\.[^.]+)?\.weight)|"
    r"(?P<up>(lora_up|lora_B|lora\.up)(\.[^.]+)?\.weight)|"
    r"(?P<up_bias>(lora_up|lora_B|lora\.up)(\.[^.]+)?\.bias)|"
    r"(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b))"
)
# Parts of keys by which other methods are known.
_OTHER_METHODS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "boft_": "BOFT",
    "vera_": "VeRA",
    "lora_mid": "LoCon with a Tucker core",
}

Parts = dict[str, str]  # kind of part, as the groups of _PART -> key in the file


def read_lora(file: Path, weight: float, base: Weights) -> dict[str, Update]:
    """What a LoRA adds to a denoiser. Reads the header and the alphas.

    Args:
        file: safetensors file.
        weight: factor of all that it adds.
        base: weights of the denoiser.

    Returns:
        Update by key of the denoiser's tensor.

    Raises:
        MissingFile: there is no such file.
        DamagedFile: the file is broken.
        UnsupportedCheckpoint: it is no safetensors file, or holds another method than LoRA.
        InvalidInput: a key matches nothing in the denoiser, lacks its counterpart, or has another shape.
    """
    if not file.is_file():
        raise MissingFile(f"{file}: no such LoRA file")
    if file.suffix != ".safetensors":
        raise UnsupportedCheckpoint(
            f"{file}: not a safetensors file; convert it first, because other formats can run code"
        )
    header = read_header(file)
    if not header:
        raise InvalidInput(f"{file}: no tensor in it; expected a LoRA")
    reader = _Reader(file, weight, base, header)
    updates: dict[str, Update] = {}
    for module, parts in reader.modules().items():
        updates |= reader.updates(module, parts)
    return updates


class _Reader:
    """One file, with what is needed to place its keys."""

    def __init__(self, file: Path, weight: float, base: Weights, header: Mapping[str, TensorInfo]):
        self.file, self.weight, self.base, self.header = file, weight, base, header
        self.spellings = module_spellings(base)
        for key in sorted(header):
            for mark, method in _OTHER_METHODS.items():
                if mark in key:
                    raise UnsupportedCheckpoint(
                        f"{file}: {key} belongs to {method}, which cannot be fused; allowed: LoRA"
                    )
        self.config = read_config(file)
        with safe_open(file, framework="pt", device="cpu") as opened:
            self.alphas: dict[str, Tensor] = {key: opened.get_tensor(key) for key in header if key.endswith(".alpha")}

    def modules(self) -> dict[str, Parts]:
        """The parts of each module, by its name in diffusers. Raises InvalidInput for a key that has no place."""
        modules: dict[str, Parts] = {}
        for key in sorted(self.header):
            found = _PART.fullmatch(key[_PREFIX.match(key).end() :])  # type: ignore[union-attr]  # matches nothing, too
            module = self.spellings.get(found["module"]) if found else None
            if found is None or module is None:
                self.refuse(key, f"matches no module of {self.base.folder}; a LoRA of another model or format")
            kind = next(name for name in ("down", "up", "up_bias", "alpha", "diff", "diff_b") if found[name])
            parts = modules.setdefault(module, {})
            if kind in parts:
                self.refuse(key, f"is the same part of {module} as {parts[kind]}")
            parts[kind] = key
            if not self.header[key].dtype.is_floating_point:
                self.refuse(key, f"has dtype {self.header[key].dtype}; expected floating point")
        return modules

    def updates(self, module: str, parts: Parts) -> dict[str, Update]:
        """What a module's parts add, by key of the denoiser's tensor."""
        weight, bias = (module, "") if module in self.base else (f"{module}.weight", f"{module}.bias")
        if "diff" in parts and "down" in parts:
            self.refuse(parts["diff"], f"changes the same weight as {parts['down']}; expected one of them")
        for kind, other in (("up", "down"), ("down", "up"), ("alpha", "down"), ("up_bias", "up")):
            if kind in parts and other not in parts:
                self.refuse(parts[kind], f"comes without its lora_{other}; the file is incomplete")
        updates: dict[str, Update] = {}
        scale = self.weight
        if "down" in parts:
            self._check_pair(weight, parts["down"], parts["up"])
            scale *= self._scale(module, parts)
            updates[weight] = LowRankUpdate(self.file, parts["down"], parts["up"], scale)
        if "diff_b" in parts and "up_bias" in parts:
            self.refuse(parts["diff_b"], f"changes the same bias as {parts['up_bias']}; expected one of them")
        for kind, target, factor in (
            ("diff", weight, self.weight), ("diff_b", bias, self.weight), ("up_bias", bias, scale)
        ):  # fmt: skip
            if kind in parts:
                self._check_shape(target, parts[kind])
                updates[target] = Difference(self.file, parts[kind], factor)
        return updates

    def _scale(self, module: str, parts: Parts) -> float:
        """alpha / r of a pair."""
        rank = self.header[parts["down"]].shape[0]
        if "alpha" not in parts:
            return config_scale(self.config, module, rank)
        key = parts["alpha"]
        if self.config is not None:
            self.refuse(key, "is an alpha beside the alpha of the file's LoRA config; expected one of them")
        alpha = self.alphas[key]
        if alpha.numel() != 1:
            self.refuse(key, f"has shape {list(alpha.shape)}; expected one number")
        return float(alpha.double().item() / rank)

    def _check_pair(self, target: str, down: str, up: str) -> None:
        if target not in self.base:
            self.refuse(down, f"changes {target}, which {self.base.folder} does not have")
        shape, a, b = self.base.shape(target), self.header[down].shape, self.header[up].shape
        rank = a[0] if a else 0
        if len(shape) < 2 or rank == 0 or a != (rank, *shape[1:]):
            self.refuse(down, f"has shape {list(a)}; {target} of shape {list(shape)} needs [rank, {_sizes(shape[1:])}]")
        if b != (shape[0], rank, *[1] * (len(shape) - 2)):
            self.refuse(up, f"has shape {list(b)}; {target} of shape {list(shape)} needs [{shape[0]}, {rank}]")

    def _check_shape(self, target: str, key: str) -> None:
        if target not in self.base:
            self.refuse(key, f"changes {target or 'a bias'}, which {self.base.folder} does not have")
        if self.header[key].shape != self.base.shape(target):
            found, needed = list(self.header[key].shape), list(self.base.shape(target))
            self.refuse(key, f"has shape {found}; {target} has {needed}: a LoRA of another model")

    def refuse(self, key: str, why: str) -> NoReturn:
        raise InvalidInput(f"{self.file}: {key} {why}")


def _sizes(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
