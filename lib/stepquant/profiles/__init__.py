"""Ready-made params files. A profile with all sections is a whole params.yaml; one with some is laid over another."""

import re
from importlib.resources import files

from stepquant.errors import UserError


def read_profiles() -> dict[str, str]:
    """Name -> text of every profile."""
    return {
        p.name.removesuffix(".yaml"): p.read_text() for p in files(__package__).iterdir() if p.name.endswith(".yaml")
    }


def overlay(current: str | None, profile: str) -> str:
    """`current` with the profile's sections in place of its own; the profile alone if it is whole.

    Works on text, section by section, so that comments survive. Raises UserError if a partial profile has nothing to
    lie on.
    """
    sections = _sections(profile)
    if "model" in sections:
        return profile
    if current is None:
        raise UserError("this profile is a recipe without a model; write a profile with a model first, such as demo")
    return "".join(sections.get(key, text) for key, text in _sections(current).items())


def written_by_profiles(ready: dict[str, str]) -> set[str]:
    """Every text that profiles alone can produce."""
    whole = {text for text in ready.values() if "model" in _sections(text)}
    partial = set(ready.values()) - whole
    return whole | {overlay(base, recipe) for base in whole for recipe in partial}


def _sections(text: str) -> dict[str, str]:
    """Top-level sections of a params file by name, "" for what stands before the first; a section ends with its blank line."""
    parts = re.split(r"(?m)^(?=[a-z])", text)
    named = {part.split(":", 1)[0]: part for part in parts[1:]}
    return {"": parts[0]} | named
