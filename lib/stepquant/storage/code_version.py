"""The source files that a module runs, found by following imports.

They give the code version in the key of a unit, and the code dependencies in dvc.yaml.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

# Plumbing: it reports, validates, schedules and stores, but cannot change a number. A change here reruns nothing.
PLUMBING = (
    "stepquant.advice",
    "stepquant.command_runner",
    "stepquant.compute",
    "stepquant.errors",
    "stepquant.models.checks",
    "stepquant.models.hub",
    "stepquant.param_recipe",
    "stepquant.param_sections",
    "stepquant.params",
    "stepquant.preflight",
    "stepquant.storage.atomic",
    "stepquant.storage.code_version",
    "stepquant.storage.digests",
    "stepquant.storage.json_files",
    "stepquant.storage.yaml_files",
    "stages.__init__",
    "stages._artifacts",
    "stages._stage",
)


def source_files(module: Path, roots: dict[str, Path]) -> list[Path]:
    """The Python files that a module runs, itself included, without plumbing.

    Args:
        module: The file of the module.
        roots: Name of a top-level package -> its folder, such as {"stepquant": lib/stepquant}. Imports from other
            packages are not followed.

    Returns:
        Paths, sorted.
    """
    found: dict[Path, None] = {}
    queue = [module]
    while queue:
        path = queue.pop()
        if path not in found:
            found[path] = None
            queue += [file for name in _imports(path) for file in _files(name, roots)]
    return sorted(found)


def code_digest(files: list[Path]) -> str:
    """SHA-256 (hex) over the contents of the files, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _imports(path: Path) -> Iterator[str]:
    """Names that a file imports; some of them are no modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from package import module` names a module and `from module import name` does not, so try both.
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(name: str, roots: dict[str, Path]) -> Iterator[Path]:
    """The files that an import of `name` runs: the module, and __init__ of each package above it."""
    top, *rest = name.split(".")
    if top not in roots or _is_plumbing(name):
        return
    for depth in range(len(rest) + 1):
        folder = roots[top].joinpath(*rest[:depth])
        initializer = ".".join([top, *rest[:depth], "__init__"])
        for file in (folder.with_suffix(".py"), folder / "__init__.py"):
            if file.is_file() and _has_code(file) and not (file.name == "__init__.py" and _is_plumbing(initializer)):
                yield file


def _is_plumbing(name: str) -> bool:
    return any(name == plumbing or name.startswith(plumbing + ".") for plumbing in PLUMBING)


def _has_code(file: Path) -> bool:
    """Whether a module can change a number. An __init__ without imports at its top level cannot."""
    imports = (ast.Import, ast.ImportFrom)
    return file.name != "__init__.py" or any(isinstance(node, imports) for node in ast.parse(file.read_text()).body)
