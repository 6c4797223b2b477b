"""artifacts/schedule.json: the precision of every slot, and the errors from which it was found."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from stepquant.errors import DamagedFile, MissingFile
from stepquant.recipe.precision import ERRORS
from stepquant.storage.atomic import write_text
from stepquant.storage.json_files import to_json


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpertSchedule(_Part):
    """The slots of one expert.

    Attributes:
        bin_edges: of its bins, falling.
        sites: names of the sites of a block, in order.
        eight_bit: bins whose activations take 8 bits, by block and site; others are not listed.
        errors: what each slot adds to the squared error of the final latent, by kind of error
            (ERRORS of recipe/precision.py): [bins, blocks, sites].
        cost: multiply-adds of each slot in a sampled video, [bins, sites], the same for every block.
    """

    bin_edges: list[float]
    sites: list[str]
    eight_bit: dict[int, dict[str, list[int]]]
    errors: dict[str, list[list[list[float]]]]
    cost: list[list[float]]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.errors["weights"][0])

    def bins(self, block: int, site: str) -> tuple[int, ...]:
        """The bins in which a site of a block takes 8-bit activations."""
        return tuple(self.eight_bit.get(block, {}).get(site, ()))


class Schedule(_Part):
    """The precision schedule of a model.

    Attributes:
        eight_bit_format: format of the 8-bit activations.
        budget: share of the multiply-adds that may take them.
        share: share that takes them.
        experts: by name.
    """

    eight_bit_format: str
    budget: float
    share: float
    experts: dict[str, ExpertSchedule]

    def expert(self, name: str) -> ExpertSchedule:
        """The slots of an expert. Raises DamagedFile if there are none of it."""
        if name not in self.experts:
            raise DamagedFile(f"schedule: has {', '.join(self.experts)}, not {name}; run stage schedule again")
        return self.experts[name]

    def predicted_error(self, eight_bit: bool) -> float:
        """Squared error of the final latent, summed over its entries, with 4-bit activations alone or as scheduled."""
        return sum(_predicted(expert, eight_bit) for expert in self.experts.values())


def _predicted(expert: ExpertSchedule, eight_bit: bool) -> float:
    narrow, wide, weights = (expert.errors[kind] for kind in ERRORS)
    total = 0.0
    for b, blocks in enumerate(narrow):
        for block, sites in enumerate(blocks):
            for s, name in enumerate(expert.sites):
                scheduled = eight_bit and b in expert.bins(block, name)
                total += (wide[b][block][s] if scheduled else sites[s]) + weights[b][block][s]
    return total


def write_schedule(path: Path, schedule: Schedule) -> None:
    """Write the file."""
    write_text(path, to_json(schedule.model_dump(mode="json")))


def read_schedule(path: Path) -> Schedule:
    """Read the file. Raises MissingFile or DamagedFile."""
    try:
        return Schedule.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise MissingFile(f"{path}: not there; run stage schedule first (dvc repro schedule)") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DamagedFile(f"{path}: {where}: {first['msg']}; run stage schedule again") from None
