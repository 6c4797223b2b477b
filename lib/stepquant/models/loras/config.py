"""How a LoRA is scaled: alpha / r, from the file's metadata, PEFT's adapter_config.json, or tensors named alpha."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from stepquant.errors import DamagedFile, UnsupportedCheckpoint

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The key under which diffusers' save_lora_weights stores the LoraConfig (diffusers 0.42.1, loaders/lora_base.py).
METADATA_KEY = "lora_adapter_metadata"

# Keys of PEFT's LoraConfig (0.21) that the scale is computed from, or that only say how it was trained or loaded.
# Another key with a value changes what the adapter does, so it is refused.
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_TRAINING = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_bias", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "ensure_weight_tying",
)  # fmt: skip
# Initializations that leave the base weights as they are. The others change them when the adapter is loaded.
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


def config_file(lora: Path) -> Path | None:
    """The adapter_config.json beside a file that PEFT saved; None for other files."""
    config = lora.with_name(ADAPTER_CONFIG)
    return config if lora.name == ADAPTER_FILE and config.is_file() else None


def read_config(lora: Path) -> dict[str, Any] | None:
    """The LoraConfig that belongs to a LoRA file, or None.

    Raises:
        DamagedFile: it is not JSON, or has no alpha.
        UnsupportedCheckpoint: it describes another method than LoRA, by name.
    """
    sidecar = config_file(lora)
    with safe_open(lora, framework="pt", device="cpu") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if sidecar is not None:
        text = sidecar.read_text(encoding="utf-8")
    if text is None:
        return None
    try:
        config: dict[str, Any] = json.loads(text)
        # A pipeline's file names the component in front of each key.
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
    except (ValueError, AttributeError) as error:
        raise DamagedFile(f"{sidecar or lora}: its LoRA config is not a JSON object ({error})") from None
    _check(config, sidecar or lora)
    return config


def _check(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type", "LORA") not in ("LORA", None):
        raise UnsupportedCheckpoint(f"{where}: an adapter of type {config['peft_type']}; allowed: LORA")
    if config.get("init_lora_weights") not in _INITIALIZATIONS:
        raise UnsupportedCheckpoint(
            f"{where}: init_lora_weights {config['init_lora_weights']!r} changes the base weights; convert the adapter "
            "to a plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {*_SCALING, *_TRAINING, "init_lora_weights"}
    for key in sorted(set(config) - known):
        if config[key] and (key, config[key]) != ("bias", "none"):
            method = "DoRA" if key == "use_dora" else f"{key}: {config[key]!r}"
            raise UnsupportedCheckpoint(
                f"{where}: the adapter uses {method}, which cannot be fused; allowed: plain LoRA"
            )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise DamagedFile(f"{where}: its LoRA config has no number lora_alpha")


def config_scale(config: Mapping[str, Any] | None, module: str, rank: int) -> float:
    """alpha / r as PEFT computes it (0.21, tuners/lora/layer.py, update_layer); alpha = r without a config.

    Args:
        config: from `read_config`.
        module: name of the module, as the patterns of the config match it.
        rank: r, the rows of its down matrix.
    """
    if config is None:
        return 1.0
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = config["lora_alpha"] if alpha is None else alpha
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
