"""The `stepquant` command: what works anywhere, and the pipeline's stages when it runs inside the repository."""

import ast
import importlib
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from stepquant import params as knobs
from stepquant.commands import command
from stepquant.errors import UserError
from stepquant.files import write_text

STAGES = ("model", "trajectories", "capture", "lowrank", "gptq", "clip", "pack", "generate", "evaluate", "report")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Timestep-aware W4A4 quantization of image-to-video diffusion transformers.",
)


@app.command()
@command
def check(params: Annotated[Path, typer.Option(help="The params file to check.")] = Path("params.yaml")) -> None:
    """Validate a params file: every section, and every section as each expert sees it."""
    knobs.check(params)
    print(f"{params}: fine")


@app.command()
@command
def profile(
    name: Annotated[str, typer.Argument(help="demo, paper or wan2.2-i2v-a14b.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite changes of your own.")] = False,
    params: Annotated[Path, typer.Option(help="The file to write.")] = Path("params.yaml"),
) -> None:
    """Write params.yaml from a ready-made profile; changes of your own are kept unless --force is given."""
    folder = files("stepquant") / "profiles"
    profiles = {p.name.removesuffix(".yaml"): p.read_text() for p in folder.iterdir() if p.name.endswith(".yaml")}
    if name not in profiles:
        raise UserError(f"no profile '{name}'; allowed: {', '.join(sorted(profiles))}")
    if params.exists() and not force and params.read_text() not in profiles.values():
        raise UserError(f"{params} has changes that no profile has; keep them, or overwrite them with --force")
    write_text(params, profiles[name])
    print(f"{params}: now the profile {name}")


def _add_stages() -> None:
    """Offer the stages if this is a checkout of the repository: they belong to it, not to the wheel.

    Only the stage that is called is imported, which brings torch; the others are known by their docstrings.
    """
    here = Path.cwd()
    if not (here / "dvc.yaml").is_file() or not (here / "stages" / "common.py").is_file():
        return
    sys.path.insert(0, str(here))
    for name in STAGES:
        called = name in sys.argv[1:2]
        function = getattr(importlib.import_module(f"stages.{name}"), name) if called else _described(here / "stages" / f"{name}.py", name)
        app.command(name, rich_help_panel="Stages")(function)


def _described(file: Path, name: str) -> Callable[[], None]:
    """A stand-in with the stage's docstring, for the list of commands."""

    def stand_in() -> None: ...

    functions = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef))
    stand_in.__doc__ = next(ast.get_docstring(node) for node in functions if node.name == name)
    return stand_in


_add_stages()
