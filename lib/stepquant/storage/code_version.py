"""Which source files a module runs, found by following imports: the code version in a unit's key, and the code
dependencies that dvc.yaml must name."""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

# Plumbing: reports, validates, schedules and stores, but cannot change a number. A change here reruns nothing.
PLUMBING = (
    "stepquant.command_runner",
    "stepquant.compute",
    "stepquant.errors",
    "stepquant.param_recipe",
    "stepquant.param_sections",
    "stepquant.params",
    "stepquant.storage.atomic",
    "stepquant.storage.code_version",
    "stepquant.storage.digests",
    "stepquant.storage.json_files",
    "stages.__init__",
    "stages._artifacts",
    "stages._stage",
)


def source_files(module: Path, roots: dict[str, Path]) -> list[Path]:
    """The Python files that `module` runs, itself included, without plumbing.

    roots: top-level package name -> its folder, such as {"stepquant": lib/stepquant}. Sorted by path.
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
    """SHA-256 over the contents of the files in their order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from package import module` names a module, `from module import name` does not: try both.
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(name: str, roots: dict[str, Path]) -> Iterator[Path]:
    """Files that importing `name` runs: the module and the __init__ of each package above it."""
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
    """Whether a module can reach a number: a package's docstring cannot, nor can the root's list of lazy exports."""
    imports = (ast.Import, ast.ImportFrom)
    return file.name != "__init__.py" or any(isinstance(node, imports) for node in ast.parse(file.read_text()).body)
