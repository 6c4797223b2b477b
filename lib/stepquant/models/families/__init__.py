"""The pipeline classes that stepquant knows, one file each."""

from typing import Any

from stepquant.errors import InvalidInput
from stepquant.models.families import wan_image_to_video, wan_text_to_video
from stepquant.models.families.description import DenoiserClass, Family

_FAMILIES = {family.pipeline: family for family in (wan_image_to_video.FAMILY, wan_text_to_video.FAMILY)}
_DENOISERS = {family.denoiser.name: family.denoiser for family in _FAMILIES.values()}


def find_family(class_name: Any) -> Family:
    """The family of a pipeline class.

    Args:
        class_name: `_class_name` of model_index.json; custom pipelines have no plain name there.

    Raises:
        InvalidInput: stepquant does not know this pipeline class.
    """
    if not isinstance(class_name, str) or class_name not in _FAMILIES:
        raise InvalidInput(
            f"model_index.json: _class_name {class_name!r} is not supported; allowed: {_names(_FAMILIES)}"
        )
    return _FAMILIES[class_name]


def find_denoiser(class_name: Any) -> DenoiserClass:
    """The description of a denoiser class, by `_class_name` of its config.json. Raises InvalidInput for another one."""
    if not isinstance(class_name, str) or class_name not in _DENOISERS:
        raise InvalidInput(f"config.json: _class_name {class_name!r} is not supported; allowed: {_names(_DENOISERS)}")
    return _DENOISERS[class_name]


def _names(known: dict[str, Any]) -> str:
    return ", ".join(known)
