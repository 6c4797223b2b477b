"""Ready-made params files.

A profile is one of three kinds:

    whole     a complete params.yaml
    on base   begins with "# base: NAME" and holds the sections that differ from those of that whole profile
    recipe    sections that are applied on top of the user's own params.yaml

The line below a profile's base, or its first line, describes it. A section is replaced as a whole, with the comment
lines directly above it, so that what is written is a complete and commented params.yaml.
"""

import re
from importlib.resources import files

from stepquant.errors import UserError

_BASE = re.compile(r"# base: (\S+)\n")


def read_profiles() -> dict[str, str]:
    """Name -> text of every profile, as it is in its file."""
    found = {p.name.removesuffix(".yaml"): p for p in files(__package__).iterdir() if p.name.endswith(".yaml")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def list_profiles(ready: dict[str, str]) -> list[tuple[str, str]]:
    """Name and one line about each profile."""
    return [(name, _without_base(text).split("\n", 1)[0].removeprefix("# ")) for name, text in ready.items()]


def choose(ready: dict[str, str], name: str) -> str:
    """The text of a profile, whole unless it is a recipe.

    Raises:
        UserError: There is no such profile.
    """
    if name not in ready:
        raise UserError(f"no profile '{name}'; allowed: {', '.join(sorted(ready))}")
    base = _BASE.match(ready[name])
    if base is None:
        return ready[name]
    own, sections = _sections(ready[base[1]]), _sections(_without_base(ready[name]))
    # Its own description stands in place of its base's, which is one line.
    return _joined(own, sections, sections[""] + own[""].partition("\n")[2])


def overlay(current: str | None, profile: str) -> str:
    """Apply a profile on top of a params file.

    Works on the text, section by section, so that comments are kept.

    Args:
        current: The text of the params file, or None if there is none.
        profile: The text of the profile, from `choose`.

    Returns:
        The profile if it is whole; else `current` with the sections of the profile instead of its own. Bins of other
        experts than those of `current` are left out.

    Raises:
        UserError: The profile is a recipe, and there is no params file.
    """
    if "model" in _sections(profile):
        return profile
    if current is None:
        raise UserError("this profile is a recipe without a model; write a profile with a model first, such as demo")
    own, sections = _sections(current), _sections(profile)
    if _keys(own.get("bins", "")) != _keys(sections.get("bins", "")):
        sections.pop("bins", None)
    return _joined(own, sections, own[""])


def written_by_profiles(ready: dict[str, str]) -> set[str]:
    """Every text that profiles can produce without changes by the user."""
    chosen = {choose(ready, name) for name in ready}
    whole = {text for text in chosen if "model" in _sections(text)}
    return whole | {overlay(base, recipe) for base in whole for recipe in chosen - whole}


def _joined(own: dict[str, str], sections: dict[str, str], head: str) -> str:
    """A params file with some sections instead of its own, behind a head."""
    return head + "".join(sections.get(key, section) for key, section in own.items() if key)


def _keys(section: str) -> set[str]:
    """The keys directly below a section."""
    return set(re.findall(r"(?m)^  (\w+):", section))


def _without_base(text: str) -> str:
    return _BASE.sub("", text, count=1)


def _sections(text: str) -> dict[str, str]:
    """Section name -> its text, from the comment directly above it to the next one; "" is what is before the first."""
    parts = {"": ""}
    name, pending = "", ""
    for line in text.splitlines(keepends=True):
        if line.startswith("#"):
            pending += line
            continue
        if line[:1].isalpha():
            name = line.split(":", 1)[0]
            parts[name] = ""
        parts[name] += pending + line
        pending = ""
    parts[name] += pending
    return parts
