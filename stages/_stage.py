"""What every stage does around its work: read its own parameters, prepare the device, take the lock.

Plumbing only: nothing here can change a number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Annotated, Any

import typer

from stages import _artifacts as artifacts
from stepquant import params as parameters
from stepquant.compute.executor import Executor
from stepquant.compute.process import die_with_parent, exclusive
from stepquant.compute.units import UnitStore
from stepquant.models.changes import check_unchanged
from stepquant.models.manifest import ModelManifest, read_manifest
from stepquant.recipe.variants import ORDER
from stepquant.storage.code_version import code_digest, source_files
from stepquant.storage.digests import content_key
from stepquant.torch_setup import ARITHMETIC, SAMPLING, numerics_versions, prepare_torch

ROOT = Path(__file__).resolve().parent.parent
UNITS = Path(".units")
CODE = {"stepquant": ROOT / "lib/stepquant", "stages": ROOT / "stages"}

ParamsFile = Annotated[Path, typer.Option("--params", help="The params file to read.")]
Expert = Annotated[str, typer.Option(help="Which denoiser: high_noise, low_noise, or denoiser for a dense model.")]
VariantName = Annotated[str, typer.Option("--variant", help=f"Which recipe: {', '.join(ORDER)}.")]


def described_model() -> ModelManifest:
    """The manifest that stage model wrote, if the source model is still the one that it describes.

    Raises:
        UserError: The manifest is missing or invalid, or a file of the model has changed.
    """
    manifest = read_manifest(artifacts.MODEL)
    check_unchanged(artifacts.MODEL, manifest)
    return manifest


class Place(Enum):
    """Where a stage uses `compute.device`."""

    STAGE = auto()  # in the process of the stage
    WORKERS = auto()  # in the workers of the executor, one of which can be the stage itself
    NOWHERE = auto()


@dataclass(frozen=True)
class Stage:
    """One run of a stage.

    Attributes:
        name: The name of the stage.
        sections: Its validated sections of the parameters.
        units: The store of its finished units.
        code: Digest of the code that it runs.
        versions: What else decides numbers where the work runs (torch_setup.numerics_versions).
        workers: The executor of a stage that has Place.WORKERS.
    """

    name: str
    sections: dict[str, Any]
    units: UnitStore
    code: str
    versions: dict[str, str]
    workers: Executor | None

    def __getitem__(self, section: str) -> Any:
        """A section of the parameters; KeyError (a bug of ours) if the stage did not say that it reads it."""
        return self.sections[section]

    def key(self, reads: tuple[str, ...] | None = None, **inputs: Any) -> str:
        """The key of one unit.

        Args:
            reads: The sections that the unit depends on; None for all of the stage's.
            **inputs: What the unit is made from, as JSON: digests of artifacts, numbers of blocks ...

        Returns:
            A digest of these and of the stage's name, code and library versions.
        """
        params = {name: self.sections[name].decisive() for name in (self.sections if reads is None else reads)}
        return content_key(stage=self.name, code=self.code, versions=self.versions, params=params, inputs=inputs)

    def executor(self) -> Executor:
        """Makes units with the workers that the parameters ask for. A context: its end stops the workers."""
        if self.workers is None:
            raise ValueError(f"stage {self.name} has no workers; open it with Place.WORKERS")
        return self.workers


@contextmanager
def open_stage(
    file: str,
    reads: tuple[str, ...],
    params: Path,
    *,
    expert: str | None = None,
    variant: str | None = None,
    device: Place = Place.STAGE,
) -> Iterator[Stage]:
    """Everything around the work of a stage.

    Args:
        file: The file of the stage, which names it.
        reads: The sections of the parameters that it gets.
        params: The params file.
        expert: Whose overrides to merge in.
        variant: The variant of the stage. Together with the expert it names the lock and the store of the units.
        device: Where `compute.device` is used, and therefore checked.

    Yields:
        The open stage, under its lock. Half-written units of killed processes have been removed.

    Raises:
        UserError: A parameter or the device is not allowed, or the stage is running already.
    """
    die_with_parent()
    name = Path(file).stem
    sections = {section: parameters.section(params, section, expert) for section in reads}
    if "format" in reads:
        parameters.check_target(params, expert)
        parameters.check_budget(params)
    label = "@".join(filter(None, (name, expert or variant)))
    code = code_digest(source_files(Path(file), CODE))
    with exclusive(UNITS / f"{label}.lock"), _prepared(sections, device) as (workers, versions):
        units = UnitStore(UNITS / label)
        units.sweep()
        yield Stage(name, sections, units, code, versions, workers)


@contextmanager
def _prepared(sections: dict[str, Any], device: Place) -> Iterator[tuple[Executor | None, dict[str, str]]]:
    """The executor of a stage, if it has one, and the versions that go into the keys of its units."""
    compute = sections.get("compute")
    if compute is None or device is Place.NOWHERE:
        yield None, {}
    elif device is Place.STAGE:
        prepare_torch(compute)
        # The stages that read the section sampling encode prompts and write videos.
        yield None, numerics_versions(compute.device, ARITHMETIC + SAMPLING * ("sampling" in sections))
    else:
        with Executor(compute, list(CODE.values())) as workers:
            yield workers, workers.versions
