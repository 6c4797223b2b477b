"""Ready-made params files. A profile with all sections is a whole params.yaml; a partial one is applied on top."""

import re
from importlib.resources import files

from stepquant.errors import UserError


def read_profiles() -> dict[str, str]:
    """Name -> text of every profile."""
    return {
        p.name.removesuffix(".yaml"): p.read_text() for p in files(__package__).iterdir() if p.name.endswith(".yaml")
    }


def overlay(current: str | None, profile: str) -> str:
    """Apply a profile on top of a params file.

    Works on the text, section by section, so that comments are kept.

    Args:
        current: The text of the params file, or None if there is none.
        profile: The text of the profile.

    Returns:
        The profile if it is whole; else `current` with the sections of the profile instead of its own.

    Raises:
        UserError: The profile is partial, and there is no params file.
    """
    sections = _sections(profile)
    if "model" in sections:
        return profile
    if current is None:
        raise UserError("this profile is a recipe without a model; write a profile with a model first, such as demo")
    return "".join(sections.get(key, text) for key, text in _sections(current).items())


def written_by_profiles(ready: dict[str, str]) -> set[str]:
    """Every text that profiles can produce without changes by the user."""
    whole = {text for text in ready.values() if "model" in _sections(text)}
    partial = set(ready.values()) - whole
    return whole | {overlay(base, recipe) for base in whole for recipe in partial}


def _sections(text: str) -> dict[str, str]:
    """Section name -> text of a params file, up to the next section; "" is the text before the first one."""
    parts = re.split(r"(?m)^(?=[a-z])", text)
    named = {part.split(":", 1)[0]: part for part in parts[1:]}
    return {"": parts[0]} | named
