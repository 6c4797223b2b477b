"""Every tensor of a component against its class: names and shapes from the class on the meta device, which has no
values, and from the headers of the weight files. Nothing is loaded, so the real model takes seconds.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from stepquant.errors import InvalidInput
from stepquant.models.checks.components import Component
from stepquant.models.checks.quiet import quiet
from stepquant.models.configs import read_config
from stepquant.models.weights import Weights, open_weights

# Values of these dtypes are numbers as they are, without scales in other tensors.
COMPUTABLE = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
# Names under which programs store the scales of quantized weights.
SCALE = re.compile(r"scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|absmax|quant_map|weight_scale_inv")


@dataclass(frozen=True)
class Differences:
    """How the tensors of a component differ from those of its class.

    Attributes:
        missing: keys that the class has and the files lack.
        extra: keys that the files have and the class does not.
        shapes: key -> shape in the files and shape in the class, where they differ.
    """

    missing: list[str]
    extra: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def check_tensors(component: Component) -> None:
    """Check the weights of a component. Does nothing if it has none.

    Raises:
        InvalidInput: a tensor is missing, unknown, of another shape, or of a dtype that is no number by itself.
        UserError: as `open_weights`.
    """
    if not component.is_model:
        return
    weights, model = open_weights(component.folder), _on_meta(component)
    compare = _transformers_differences if component.library == "transformers" else _diffusers_differences
    found = compare(model, weights)
    expected: dict[str, torch.Tensor] = model.state_dict()
    if found.extra or found.missing or found.shapes:
        raise InvalidInput(f"{component.folder}: {_message(found, set(expected), weights, component.class_name)}")
    for key in weights:
        wanted = expected[key].dtype if key in expected else torch.float32
        if wanted.is_floating_point and weights.dtype(key) not in COMPUTABLE:
            raise InvalidInput(
                f"{component.folder}: tensor {key!r} is {_name(weights.dtype(key))}; allowed: "
                f"{', '.join(map(_name, COMPUTABLE))}, so give the unquantized weights"
            )


def _on_meta(component: Component) -> Any:
    """The model as its config describes it, without values."""
    loaded, file = component.load(), component.folder / "config.json"
    try:
        with quiet(), torch.device("meta"):
            if component.library == "transformers":
                return loaded(loaded.config_class.from_pretrained(component.folder, local_files_only=True))
            return loaded.from_config(read_config(file))
    except Exception as error:  # of the class's own code, which checks its config in many ways
        raise InvalidInput(
            f"{file}: {component.class_name} cannot be built from it: {' '.join(str(error).split())}"
        ) from None


def _diffusers_differences(model: Any, weights: Weights) -> Differences:
    """As ModelMixin.from_pretrained would see it."""
    expected = model.state_dict()
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    return Differences(
        missing=[key for key in expected if key not in weights],
        extra=[key for key in weights if key not in expected and not any(re.search(p, key) for p in ignored)],
        shapes={
            key: (weights.shape(key), tuple(tensor.shape))
            for key, tensor in expected.items()
            if key in weights and weights.shape(key) != tuple(tensor.shape)
        },
    )


def _transformers_differences(model: Any, weights: Weights) -> Differences:
    """What transformers' own loader says, which knows tied weights and older names; it is given meta tensors."""
    tensors = {key: torch.empty(weights.shape(key), dtype=weights.dtype(key), device="meta") for key in weights}
    with quiet():
        _, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=tensors,
            output_loading_info=True,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
        )
    shapes = {key: (tuple(stored), tuple(wanted)) for key, stored, wanted in info["mismatched_keys"]}
    return Differences(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), shapes)


def _message(found: Differences, expected: set[str], weights: Weights, class_name: str) -> str:
    """The difference that says most about its cause."""
    if scales := [key for key in found.extra if SCALE.search(key)]:
        return (
            f"tensor {scales[0]!r}: these weights are scaled (fp8, or quantized otherwise), and {class_name} would "
            "ignore the scales; give BF16 weights, or fp8 weights without scales"
        )
    stored, described = _stack_sizes(weights), _stack_sizes(expected)
    for stack, count in described.items():
        if stack in stored and stored[stack] != count:
            return (
                f"the weights have {stored[stack]} of {stack!r}, config.json describes {count}; use the config.json "
                "that belongs to these weights"
            )
    if found.missing:
        return f"no tensor {found.missing[0]!r}{_more(found.missing)}; expected the weights of a {class_name}"
    if found.extra:
        return f"unknown tensor {found.extra[0]!r}{_more(found.extra)}; expected the weights of a {class_name}"
    key, (shape, wanted) = next(iter(found.shapes.items()))
    return f"tensor {key!r} has shape {list(shape)}, config.json describes {list(wanted)}"


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _stack_sizes(keys: Iterable[str]) -> dict[str, int]:
    """Name of each outermost list of modules -> highest index + 1."""
    sizes: dict[str, int] = {}
    for key in keys:
        if match := re.match(r"(.*?)\.(\d+)\.", key):
            sizes[match[1]] = max(sizes.get(match[1], 0), int(match[2]) + 1)
    return sizes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
