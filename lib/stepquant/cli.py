"""The `stepquant` command. Inside the repository it offers the stages of the pipeline as well."""

import ast
import importlib
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from stepquant import params as parameters
from stepquant import profiles
from stepquant.command_runner import command
from stepquant.errors import UserError
from stepquant.storage.atomic import write_text

STAGES = (
    "model",
    "trajectories",
    "capture",
    "lowrank",
    "gptq",
    "clip",
    "sensitivity",
    "schedule",
    "pack",
    "generate",
    "evaluate",
    "report",
)


class Exporter(str, Enum):
    """Programs that checkpoints can be exported to."""

    COMFYUI = "comfyui"


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Timestep-aware W4A4 quantization of video diffusion transformers.",
)


@app.command()
@command
def check(params: Annotated[Path, typer.Option(help="The params file to check.")] = Path("params.yaml")) -> None:
    """Validate a params file: every section with the overrides of each expert, then the model and the prompts.

    Nothing is downloaded: a model or a manifest that is not here is left to the stages that read it.
    """
    from stepquant.preflight import is_here, look_at_model, look_at_prompts

    parameters.check(params)
    if is_here(params):
        look_at_model(params)
    look_at_prompts(params)
    print(f"{params}: fine")


@app.command()
@command
def profile(
    name: Annotated[str | None, typer.Argument(help="One of the profiles; without it, they are listed.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite your own changes.")] = False,
    params: Annotated[Path, typer.Option(help="The file to write.")] = Path("params.yaml"),
) -> None:
    """Write params.yaml from a ready-made profile. Your own changes are not overwritten unless --force is given."""
    ready = profiles.read_profiles()
    if name is None:
        for known, description in profiles.list_profiles(ready):
            print(f"{known:26} {description}")
        return
    chosen = profiles.choose(ready, name)
    current = params.read_text(encoding="utf-8-sig") if params.exists() else None
    if current is not None and not force and current not in profiles.written_by_profiles(ready):
        raise UserError(f"{params} has your own changes; keep them, or overwrite them with --force")
    write_text(params, profiles.overlay(current, chosen))
    parameters.check(params)
    print(f"{params}: now the profile {name}")


@app.command()
@command
def show(
    folder: Annotated[Path, typer.Option(help="Where stage evaluate writes.")] = Path("artifacts/metrics"),
    variant: Annotated[
        list[str] | None, typer.Option(help="Show this variant only; can be repeated. Without it, all that were made.")
    ] = None,
) -> None:
    """Print the summary table over the variants, and where the report is."""
    from rich.console import Console

    from stepquant.evaluate.metrics_file import read_records
    from stepquant.report.tables import brief_table, rich_table

    Console().print(rich_table(brief_table(read_records(folder, variant))))
    print(f"full report: {folder.parent / 'report' / 'index.html'}")


@app.command()
@command
def plan(
    params: Annotated[Path, typer.Option(help="The params file of the run.")] = Path("params.yaml"),
    profile: Annotated[str | None, typer.Option(help="A ready-made profile instead of it.")] = None,
    machine: Annotated[
        list[str] | None, typer.Option(help="cpu, rtx4090, a100, h100 or 8xh100; can be repeated.")
    ] = None,
) -> None:
    """Print what a run would take, before it runs: time, memory and disk per stage, computed from shapes.

    Without --machine, the plan is for this machine if compute.device is cpu, else for some common GPUs.
    """
    from stepquant.plan.printing import print_plan

    print_plan(params, profile, machine or [])


@app.command()
@command
def doctor(
    params: Annotated[Path, typer.Option(help="The params file, if there is one.")] = Path("params.yaml"),
) -> None:
    """Check this machine: versions, devices, free space, missing packages. Exit code 1 if something must be fixed."""
    from stepquant.doctor import examine

    healthy = True
    for finding in examine(params):
        print(finding.line)
        healthy &= finding.fine
    raise typer.Exit(0 if healthy else 1)


@app.command("import")
@command
def import_(
    out: Annotated[Path, typer.Argument(help="The diffusers folder to write, such as data/models/NAME.")],
    base: Annotated[Path, typer.Option(help="Diffusers folder of the model that was finetuned.")],
    high_noise: Annotated[Path | None, typer.Option(help="Single file of the high-noise expert.")] = None,
    low_noise: Annotated[Path | None, typer.Option(help="Single file of the low-noise expert.")] = None,
    denoiser: Annotated[Path | None, typer.Option(help="Single file of a model with one expert.")] = None,
) -> None:
    """Make a diffusers folder of a finetune in single files with Wan-Video's names, for model.source."""
    from stepquant.models.single_file import import_files

    given = {"high_noise": high_noise, "low_noise": low_noise, "denoiser": denoiser}
    import_files(base, {name: file for name, file in given.items() if file is not None}, out)
    print(f"{out}: written; set model.source to it")


@app.command()
@command
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder that stage pack wrote, such as artifacts/checkpoints/full.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write. Its name begins the names of the files.")],
    to: Annotated[Exporter, typer.Option(help="The program that will read the files.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; print the files and their sizes.")] = False,
) -> None:
    """Write a checkpoint as another program reads it. docs/deploy.md says which file runs where.

    The checkpoint must have been made for that program (target.program in params.yaml): an export only arranges tensors
    anew, and refuses what the program cannot carry.
    """
    from stepquant.checkpoint.exporters.comfyui import export_comfyui, plan_export

    files = plan_export(checkpoint, out)
    for file in files:
        print(f"{out / file.name}: {len(file.linears)} quantized linears, {file.nbytes / 1e9:.3f} GB")
    if not dry_run:
        export_comfyui(checkpoint, out, files)
        print(f"{out}: written for {to.value}")


@app.command()
@command
def gc(
    keep_days: Annotated[
        float, typer.Option(min=0, help="Keep units younger than this, from which an interrupted run continues.")
    ] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing; print what would be removed.")] = False,
    artifacts: Annotated[Path, typer.Option(help="Where the stages write.")] = Path("artifacts"),
    units: Annotated[Path, typer.Option(help="Where finished units of work are.")] = Path(".units"),
) -> None:
    """Remove units of work that belong to no artifact.

    Earlier results stay in the cache of DVC, which `dvc gc` empties.
    """
    from stepquant.compute.garbage import collect

    found = collect(units, artifacts, keep_days, dry_run)
    print(f"{'would remove' if dry_run else 'removed'} {found.units} units, {found.bytes / 1e6:,.1f} MB")


def _add_stages() -> None:
    """Offer the stages if the current folder is a checkout: they are part of the repository, not of the wheel.

    Only the stage that is called is imported, because it imports torch. The others are listed by their docstrings.
    """
    here = Path.cwd()
    if not (here / "dvc.yaml").is_file() or not (here / "stages" / "_stage.py").is_file():
        return
    sys.path.insert(0, str(here))
    for name in STAGES:
        called = name in sys.argv[1:2]
        function = (
            getattr(importlib.import_module(f"stages.{name}"), name)
            if called
            else _described(here / "stages" / f"{name}.py", name)
        )
        app.command(name, rich_help_panel="Stages")(function)


def _described(file: Path, name: str) -> Callable[[], None]:
    """A stand-in with the stage's docstring, for the list of commands."""

    def stand_in() -> None: ...

    functions = (node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef))
    stand_in.__doc__ = next(ast.get_docstring(node) for node in functions if node.name == name)
    return stand_in


_add_stages()

if __name__ == "__main__":
    app()
