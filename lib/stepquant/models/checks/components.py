"""The components of a source pipeline: each that the pipeline class needs is there, of its class, and not quantized."""

import inspect
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepquant.errors import InvalidInput, MissingFile, UnsupportedCheckpoint
from stepquant.models.checks.quiet import quiet
from stepquant.models.configs import read_config
from stepquant.models.families import find_family
from stepquant.models.weights import STEMS

LIBRARIES = ("diffusers", "transformers")
# Classes that a pipeline takes as well as the one in its signature: the same model with one more layer on top.
ALSO = {"CLIPVisionModel": ("CLIPVisionModelWithProjection",)}
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class Component:
    """A component that model_index.json names.

    Attributes:
        name: key in model_index.json, and name of the folder.
        folder: the folder.
        library: diffusers or transformers.
        class_name: its class.
    """

    name: str
    folder: Path
    library: str
    class_name: str

    @property
    def is_model(self) -> bool:
        """Whether it has weights. Schedulers, tokenizers and processors have configs of other names."""
        return (self.folder / "config.json").is_file()

    def load(self) -> Any:
        """The class itself. Raises InvalidInput if the installed library does not have it."""
        import importlib

        found = getattr(importlib.import_module(self.library), self.class_name, None)
        if found is None:
            raise InvalidInput(f"{self.folder}: {self.library} has no class {self.class_name}")
        return found


def check_components(folder: Path) -> dict[str, Component]:
    """Check the components of a pipeline against the signature of its class. Reads configs only.

    Args:
        folder: of the pipeline.

    Returns:
        The components that are there, by name.

    Raises:
        MissingFile: a component that the class needs is missing or null.
        InvalidInput: a component is of another class, or the class does not take it.
        UnsupportedCheckpoint: a component is quantized already.
    """
    file = folder / "model_index.json"
    index = read_config(file, "_class_name")
    with quiet():
        pipeline = find_family(index["_class_name"]).load()
        hints = typing.get_type_hints(pipeline.__init__)
    parameters = inspect.signature(pipeline.__init__).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and n != "self"]
    taken = [*needed, *(n for n in pipeline._optional_components if n not in needed)]
    for name in index:
        if isinstance(index[name], list) and any(index[name]) and name not in taken:
            raise InvalidInput(
                f"{file}: names the component {name}, which {pipeline.__name__} does not take; allowed: "
                f"{', '.join(taken)}"
            )
    found = {}
    for name in taken:
        component = _component(file, name, index.get(name))
        if component is None:
            if name in needed:
                raise MissingFile(f"{file}: {name} is null or missing; {pipeline.__name__} needs it")
            continue
        _check_class(component, hints[name])
        with quiet():
            component.load()
        _check_folder(component)
        found[name] = component
    return found


def _component(file: Path, name: str, value: Any) -> Component | None:
    if value is None or value == [None, None]:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise InvalidInput(f"{file}: {name} is {value!r}; expected [library, class], or [null, null]")
    library, class_name = value
    if library not in LIBRARIES:
        raise InvalidInput(f"{file}: {name} is of {library}; allowed: {', '.join(LIBRARIES)}")
    folder = file.parent / name
    if not folder.is_dir():
        link = f"a link to {folder.readlink()}, which is not there" if folder.is_symlink() else "no such folder"
        raise MissingFile(f"{folder}: {link}, but {file} names this component")
    return Component(name, folder, library, class_name)


def _check_class(component: Component, hint: Any) -> None:
    """Models must be of the class in the pipeline's signature; other components are looked at elsewhere."""
    import torch

    classes = [c for c in (hint, *typing.get_args(hint)) if inspect.isclass(c) and issubclass(c, torch.nn.Module)]
    names = [name for c in classes for name in (c.__name__, *ALSO.get(c.__name__, ()))]
    if names and component.class_name not in names:
        raise InvalidInput(
            f"{component.folder.parent / 'model_index.json'}: {component.name} is a {component.class_name}; "
            f"allowed: {', '.join(names)}"
        )
    if names and not component.is_model:
        raise MissingFile(f"{component.folder / 'config.json'}: no such file; expected that of a diffusers pipeline")


def _check_folder(component: Component) -> None:
    """Refuse a component that is quantized, whose weights are ambiguous, or that lacks its tokenizer's files."""
    folder = component.folder
    if component.is_model:
        config = read_config(folder / "config.json")
        _check_not_quantized(folder, config.get("quantization_config"))
        own = config.get("_class_name", component.class_name)
        if own != component.class_name:
            raise InvalidInput(
                f"{folder / 'config.json'}: _class_name {own!r}, but model_index.json says {component.class_name}"
            )
        names = [f"{stem}.safetensors{suffix}" for stem in STEMS for suffix in ("", ".index.json")]
        if len(present := [name for name in names if (folder / name).is_file()]) > 1:
            raise InvalidInput(f"{folder}: has {' and '.join(present)}; remove the one that is not meant")
    if component.name == "tokenizer" and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise MissingFile(f"{folder}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}")


def _check_not_quantized(folder: Path, quantization: Any) -> None:
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "stepquant":
        raise UnsupportedCheckpoint(
            f"{folder}: already quantized by stepquant; model.source must be the pipeline that it was made from"
        )
    raise UnsupportedCheckpoint(
        f"{folder / 'config.json'}: quantization_config: quantized already ({method}); model.source must have "
        "unquantized weights in every component"
    )
