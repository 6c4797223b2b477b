"""What every stage does around its work: read its own params, check the device, lock, set threads.

Plumbing only: nothing here can change a number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant import params as parameters
from stepquant.compute.executor import Executor
from stepquant.compute.process import die_with_parent, exclusive
from stepquant.compute.units import UnitStore
from stepquant.recipe.variants import ORDER
from stepquant.storage.code_version import code_digest, source_files
from stepquant.storage.digests import content_key
from stepquant.torch_setup import prepare_torch

ROOT = Path(__file__).resolve().parent.parent
UNITS = Path(".units")
CODE = {"stepquant": ROOT / "lib/stepquant", "stages": ROOT / "stages"}

ParamsFile = Annotated[Path, typer.Option("--params", help="The params file to read.")]
Expert = Annotated[str, typer.Option(help="Which denoiser: high_noise, low_noise, or denoiser for a dense model.")]
VariantName = Annotated[str, typer.Option("--variant", help=f"Which recipe: {', '.join(ORDER)}.")]


@dataclass(frozen=True)
class Stage:
    """One run of a stage: its validated params sections, and the store of its finished units. It can be pickled."""

    name: str
    sections: dict[str, Any]
    units: UnitStore
    code: str

    def __getitem__(self, section: str) -> Any:
        """A params section; KeyError (our mistake) if the stage did not say that it reads it."""
        return self.sections[section]

    def key(self, reads: tuple[str, ...] | None = None, **inputs: Any) -> str:
        """The key of one unit: code, arithmetic, the params sections it uses (None: all of the stage's), and its inputs."""
        import torch

        params = {name: self.sections[name].decisive() for name in (self.sections if reads is None else reads)}
        return content_key(stage=self.name, code=self.code, torch=torch.__version__, params=params, inputs=inputs)

    def executor(self) -> Executor:
        """Makes this stage's units where the params say; a context, whose end is that of its workers."""
        return Executor(self["compute"], list(CODE.values()))


@contextmanager
def open_stage(
    file: str, reads: tuple[str, ...], params: Path, *, expert: str | None = None, variant: str | None = None
) -> Iterator[Stage]:
    """Everything around a stage's work: check params and device, take the lock, set threads, sweep half-written units.

    file: the stage's own file, which names it. reads: the params sections it gets; experts' overrides are merged in.
    """
    die_with_parent()
    name = Path(file).stem
    sections = {section: parameters.section(params, section, expert) for section in reads}
    if "compute" in sections:
        prepare_torch(sections["compute"])
    label = "@".join(filter(None, (name, expert or variant)))
    code = code_digest(source_files(Path(file), CODE))
    with exclusive(UNITS / f"{label}.lock"):
        units = UnitStore(UNITS / label)
        units.sweep()
        yield Stage(name, sections, units, code)
