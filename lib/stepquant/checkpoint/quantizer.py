"""Lets diffusers load a quantized denoiser: the quantizer and config class behind "quant_method": "stepquant".

After `register()`, `WanTransformer3DModel.from_pretrained`, `from_pretrained` of a pipeline and `save_pretrained` work
on stepquant checkpoints as on any other.
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from stepquant.checkpoint.guards import refuse_fusing, separate_disk_offload
from stepquant.errors import DamagedFile, InvalidInput
from stepquant.runtime.layout import QUANT_METHOD, QuantizationSettings
from stepquant.runtime.linear import W4A4Linear
from stepquant.runtime.timestep import follow_timestep


def register() -> None:
    """Let diffusers load stepquant checkpoints. Calling it again changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = StepquantConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = StepquantQuantizer


class _Method(str, Enum):
    """diffusers reads `quant_method.value`, so a plain string does not work."""

    STEPQUANT = QUANT_METHOD


class StepquantConfig(QuantizationConfigMixin):
    """QuantizationSettings in the form that diffusers expects."""

    def __init__(self, **config: Any):
        """Read the content of "quantization_config". Raises as `QuantizationSettings.from_config`."""
        self.settings = QuantizationSettings.from_config(config)
        self.quant_method = _Method.STEPQUANT

    def to_dict(self) -> dict[str, Any]:
        return self.settings.to_config()

    def to_diff_dict(self) -> dict[str, Any]:  # diffusers formats the config for its log with this
        return self.to_dict()


class StepquantQuantizer(DiffusersQuantizer):
    """Replaces the target linears by W4A4Linear and fills them. Refuses missing, unknown and wrong tensors.

    diffusers calls these methods while it loads a model; the names and arguments are those of DiffusersQuantizer.
    """

    # Otherwise norms and modulation tables, which are float32 in the unquantized model, would be loaded as torch_dtype.
    use_keep_in_fp32_modules = True

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._loaded_keys = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        settings = self.quantization_config.settings
        for target in settings.targets:
            _replace_linear(model, target, settings)
        _check_keys(set(model.state_dict()), self._loaded_keys, settings.targets)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> bool:
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), W4A4Linear)

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> None:
        found, expected = list(loaded_param.shape), list(current_param.shape)
        raise DamagedFile(f"{param_name} has shape {found}; quantization_config and config.json require {expected}")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: Mapping[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        owner, _, name = param_name.rpartition(".")
        linear = model.get_submodule(owner)
        # param_value has been cast to torch_dtype, which would round scales and clips.
        stored = state_dict[param_name]
        if name == "bias" and stored.is_floating_point():  # checkpoints of stepquant 0.1.0 have that of the source
            linear.bias = nn.Parameter(stored.to(target_device, torch.float32), requires_grad=False)
            return
        expected = getattr(linear, name).dtype
        if stored.dtype != expected:
            raise DamagedFile(f"{param_name} is {stored.dtype}; expected {expected}")
        setattr(linear, name, stored.to(target_device))

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        follow_timestep(model, self.quantization_config.settings.bin_edges)
        for module in model.modules():
            if isinstance(module, W4A4Linear):
                module.compute_dtype = model.dtype
        refuse_fusing(model)
        separate_disk_offload(model)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _replace_linear(model: nn.Module, target: str, settings: QuantizationSettings) -> None:
    """Put a W4A4Linear without values in place of the linear called target. Raises InvalidInput if there is none."""
    owner, _, name = target.rpartition(".")
    try:
        linear = model.get_submodule(target)
    except AttributeError as error:
        raise InvalidInput(f"quantization_config: target {target!r} is no module of {type(model).__name__}") from error
    if not isinstance(linear, nn.Linear):
        raise InvalidInput(f"quantization_config: target {target!r} is a {type(linear).__name__}; expected a linear")
    has_bias = linear.bias is not None or settings.mean_subtraction
    quantized = W4A4Linear(
        linear.in_features,
        linear.out_features,
        has_bias,
        settings,
        device="meta",
        rotation=settings.rotations.get(target, 0),
        eight_bit_bins=settings.eight_bit_bins.get(target, ()),
    )
    setattr(model.get_submodule(owner), name, quantized)


def _check_keys(expected: set[str], loaded: set[str], targets: Iterable[str]) -> None:
    """Refuse keys that diffusers itself only warns about."""
    if missing := sorted(expected - loaded):
        raise DamagedFile(f"checkpoint lacks {len(missing)} tensors, the first is {missing[0]!r}")
    prefixes = tuple(f"{target}." for target in targets)
    if foreign := sorted(key for key in loaded - expected if key.startswith(prefixes)):
        raise DamagedFile(
            f"checkpoint has {len(foreign)} tensors that its linears do not have, the first is {foreign[0]!r}"
        )
