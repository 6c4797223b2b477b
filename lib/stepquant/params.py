"""Reads and validates params.yaml, section by section.

A stage names the sections that it reads and gets nothing else. `experts.<expert>.<section>` holds the overrides of one
expert.
"""

from os.path import normpath
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stepquant.errors import MissingFile, UserError
from stepquant.param_recipe import Center, Clip, Format, Gptq, LowRank, Precision, Rotate, Smooth, Target
from stepquant.param_sections import (
    Bins,
    Capture,
    Compute,
    Evaluate,
    Generate,
    Lora,
    Model,
    Report,
    Sampling,
    Sensitivity,
    Storage,
    Trajectories,
)
from stepquant.storage.yaml_files import read_yaml
from stepquant.targets import LIMITED, TARGETS, check_recipe

__all__ = [
    "OVERRIDABLE",
    "SECTIONS",
    "Bins",
    "Capture",
    "Center",
    "Clip",
    "Compute",
    "Evaluate",
    "Format",
    "Generate",
    "Gptq",
    "Lora",
    "LowRank",
    "Model",
    "Precision",
    "Report",
    "Rotate",
    "Sampling",
    "Sensitivity",
    "Smooth",
    "Storage",
    "Target",
    "Trajectories",
    "check",
    "check_budget",
    "check_target",
    "expert_names",
    "glance",
    "read_params",
    "section",
]

SECTIONS: dict[str, Any] = {
    "compute": Compute,
    "model": Model,
    "sampling": Sampling,
    "trajectories": Trajectories,
    "bins": Bins,
    "storage": Storage,
    "capture": Capture,
    "target": Target,
    "format": Format,
    "smooth": Smooth,
    "center": Center,
    "rotate": Rotate,
    "lowrank": LowRank,
    "gptq": Gptq,
    "clip": Clip,
    "sensitivity": Sensitivity,
    "precision": Precision,
    "generate": Generate,
    "evaluate": Evaluate,
    "report": Report,
}
# Folder of the manifest that a section names: a dependency of the stages that read it.
WATCHED = {"trajectories": "data/calibration", "generate": "data/evaluation"}
OVERRIDABLE = ("smooth", "center", "rotate", "lowrank", "gptq", "clip")


class _Experts(BaseModel):
    """The overrides of each expert. The foreach stages of dvc.yaml use its keys."""

    model_config = ConfigDict(extra="ignore", strict=True)
    experts: Annotated[dict[str, dict[str, dict[str, Any]]], Field(min_length=1)]

    @model_validator(mode="after")
    def _known_overrides(self) -> "_Experts":
        for expert, sections in self.experts.items():
            if set(sections) != set(OVERRIDABLE):
                raise ValueError(
                    f"{expert} has {sorted(sections)}; allowed: exactly {sorted(OVERRIDABLE)} (empty is fine)"
                )
        return self


def read_params(path: Path) -> dict[str, Any]:
    """The whole file as plain data.

    Raises:
        UserError: The file is missing, is not YAML, has a key twice, or has a section that does not exist.
    """
    try:
        raw = read_yaml(path)
    except MissingFile:
        raise MissingFile(f"{path}: no such file; `stepquant profile demo` writes one") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found {type(raw).__name__}; expected sections such as {', '.join(SECTIONS)}")
    unknown = sorted(set(raw) - set(SECTIONS) - {"experts"})
    if unknown:
        raise UserError(f"{path}: unknown section '{unknown[0]}'; allowed: {', '.join([*SECTIONS, 'experts'])}")
    return raw


def section(path: Path, name: str, expert: str | None = None) -> Any:
    """One validated section of a params file.

    Args:
        path: The params file.
        name: A key of SECTIONS.
        expert: Whose overrides to merge in, if the section can have any.

    Returns:
        The model of the section, such as a Compute.

    Raises:
        UserError: A key is missing, unknown or has a value that is not allowed.
    """
    raw = read_params(path)
    values = _take(raw, path, name)
    prefix = name
    if expert is not None and name in OVERRIDABLE:
        overrides = _take(raw, path, f"experts.{expert}.{name}")
        if overrides:
            values, prefix = values | overrides, f"experts.{expert}.{name} over {name}"
    return _validate(SECTIONS[name], values, path, prefix)


def glance(path: Path, name: str) -> Any:
    """A section for a stage that only refuses by it: its values cannot change what the stage makes, so dvc.yaml does
    not declare it. None if the file lacks it. Otherwise as `section`.
    """
    return section(path, name) if name in read_params(path) else None


def expert_names(path: Path) -> list[str] | None:
    """The experts for which dvc.yaml runs stages; None if the file has no such section."""
    experts = read_params(path).get("experts")
    return list(experts) if isinstance(experts, dict) else None


def check(path: Path) -> None:
    """Validate the whole file: every section, and every section with the overrides of each expert.

    Raises:
        UserError: The first mistake that is found.
    """
    experts = _validate(_Experts, read_params(path), path, "").experts
    binned = section(path, "bins").by_expert
    if set(binned) != set(experts):
        raise UserError(f"{path}: bins has {sorted(binned)}; allowed: exactly the experts, {sorted(experts)}")
    for number, lora in enumerate(section(path, "model").loras):
        if lora.expert not in experts:
            raise UserError(
                f"{path}: model.loras.{number}.expert: found {lora.expert!r}; allowed: {', '.join(experts)}"
            )
    for name in SECTIONS:
        section(path, name)
        _check_watched(path, name)
        for expert in experts if name in OVERRIDABLE else ():
            section(path, name, expert)
    for expert in experts:
        check_target(path, expert)
    check_budget(path)


def check_target(path: Path, expert: str | None) -> None:
    """Refuse a recipe that the program of the target cannot carry, as far as the file has its sections.

    A check alone: another target changes no number, so no stage depends on it.

    Args:
        path: The params file.
        expert: Whose recipe; None for that without overrides.

    Raises:
        UserError: The first key that asks for more, or a section that is not valid.
    """
    target = glance(path, "target")
    if target is not None:
        given = [name for name in LIMITED if name in read_params(path)]
        check_recipe(TARGETS[target.program], {name: section(path, name, expert) for name in given}, str(path))


def check_budget(path: Path) -> None:
    """Refuse a budget of 8-bit activations beside a format that has 8 bits in every timestep bin.

    A check alone, as `check_target`.

    Args:
        path: The params file.

    Raises:
        UserError: There is such a budget, or a section is not valid.
    """
    target, formats, precision = (glance(path, name) for name in ("target", "format", "precision"))
    if formats and precision and formats.eight_bit_activations and precision.activation_budget:
        program = f" (target.program: {target.program})" if target else ""
        raise UserError(
            f"{path}: precision.activation_budget: found {precision.activation_budget}; {formats.activation} "
            f"activations have 8 bits in every timestep bin{program}; allowed with them: 0"
        )


def _check_watched(path: Path, name: str) -> None:
    """Refuse files of prompts whose changes DVC would not notice: dvc.yaml names a folder for each section."""
    if name not in WATCHED:
        return
    for key in ("manifest", "text_prompts"):
        found = getattr(section(path, name), key, None)
        if found is not None and not PurePosixPath(normpath(found)).is_relative_to(WATCHED[name]):
            raise UserError(
                f"{path}: {name}.{key}: found {found!r}; allowed: a file in {WATCHED[name]}/, which DVC watches"
            )


def _take(raw: dict[str, Any], path: Path, dotted: str) -> dict[str, Any]:
    node: Any = raw
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            raise UserError(f"{path}: missing key '{dotted}'")
        node = node[part]
    if not isinstance(node, dict):
        raise UserError(f"{path}: {dotted}: found {node!r}; expected a section of keys")
    return node


def _validate(model: Any, values: dict[str, Any], path: Path, prefix: str) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_message(error, model, path, prefix)) from None


def _message(error: ValidationError, model: Any, path: Path, prefix: str) -> str:
    # A misspelt key is both unknown and missing; its own name is what the user can find in the file.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # Only the first part of a location is a key: the rest are list positions and the branches of a union.
    # In a list of entries with keys, such as model.loras, the first three are.
    entry = _entry_model(model, first["loc"])
    field = first["loc"][: 3 if entry else 1]
    key = ".".join([prefix] * bool(prefix) + [str(part) for part in field])
    allowed = ", ".join((entry or model).model_fields)
    if first["type"] == "extra_forbidden":
        return f"{path}: {key}: unknown parameter; allowed: {allowed}"
    if first["type"] == "missing":
        return f"{path}: {key}: missing; expected the keys {allowed}"
    reasons = dict.fromkeys(e["msg"] for e in error.errors() if e["loc"][: len(field)] == field)
    return f"{path}: {key}: found {first['input']!r}; {'; or '.join(reasons)}"


def _entry_model(model: Any, location: tuple[int | str, ...]) -> Any:
    """The model of the list's entries in which an error lies; None if it lies elsewhere."""
    field = model.model_fields.get(location[0]) if len(location) > 2 else None
    entries = get_args(field.annotation) if field is not None else ()
    return entries[0] if entries and hasattr(entries[0], "model_fields") else None
