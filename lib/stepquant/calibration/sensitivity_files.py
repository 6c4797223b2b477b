"""The artifact of stage sensitivity.

artifacts/sensitivity/<expert>/manifest.json    bin_edges; steps: name, prompt, t, bin and branches of each
artifacts/sensitivity/<expert>/<step>/...       the files of a unit (sensitivity.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepquant.calibration.sensitivity import PRODUCTS, TOKENS
from stepquant.calibration.trajectories import Call, spread_over_bins
from stepquant.errors import DamagedFile, MissingFile
from stepquant.models.bins import Bins
from stepquant.models.prompts import check_measured
from stepquant.params import Sensitivity
from stepquant.recipe.precision import MeasuredProducts
from stepquant.storage.json_files import read_json, to_json


@dataclass(frozen=True)
class MeasuredStep:
    """A recorded step of a prompt.

    Attributes:
        prompt: id of the prompt.
        step: index of the sampling step.
        t: timestep.
        bin: its bin.
        calls: the calls of its guidance branches.
    """

    prompt: str
    step: int
    t: float
    bin: int
    calls: tuple[Call, ...]

    @property
    def name(self) -> str:
        """Folder name of the step's unit."""
        return f"{self.prompt}-{self.step:04d}"


def measured_steps(calls: list[Call], bins: Bins, settings: Sensitivity) -> list[MeasuredStep]:
    """The recorded steps that are measured: of the first calibration prompts, spread over the bins.

    Args:
        calls: all recorded calls of the expert.
        bins: the expert's bins.
        settings: how many prompts, and how many steps per bin.

    Raises:
        UserError: there are fewer calibration prompts.
    """
    calibration = [call for call in calls if call.split == "calibration"]
    prompts = list(dict.fromkeys(call.prompt for call in calibration))
    check_measured(settings, len(prompts))
    kept = [call for call in calibration if call.prompt in prompts[: settings.prompts]]
    steps: dict[tuple[str, int], list[Call]] = {}
    for call in spread_over_bins(kept, bins, settings.steps_per_bin):
        steps.setdefault((call.prompt, call.step), []).append(call)
    return [
        MeasuredStep(prompt, step, found[0].t, bins.index(found[0].t), tuple(found))
        for (prompt, step), found in steps.items()
    ]


def manifest_text(steps: Sequence[MeasuredStep], bins: Bins) -> str:
    """The content of manifest.json."""
    listed = [
        {"name": step.name, "prompt": step.prompt, "t": step.t, "bin": step.bin, "branches": len(step.calls)}
        for step in steps
    ]
    return to_json({"bin_edges": bins.edges, "steps": listed})


@dataclass(frozen=True)
class ExpertProducts:
    """The products of an expert.

    Attributes:
        bin_edges: of its bins, falling.
        branches: calls per step.
        tokens: tokens of a call by site.
        measured: the products of all steps.
    """

    bin_edges: tuple[float, ...]
    branches: int
    tokens: dict[str, int]
    measured: MeasuredProducts

    @property
    def bins(self) -> Bins:
        """The expert's bins."""
        return Bins(self.bin_edges)


def read_products(folder: Path) -> ExpertProducts:
    """The artifact of an expert. Raises UserError if it is missing or damaged."""
    manifest = read_json(folder / "manifest.json")
    steps = manifest["steps"]
    prompts, t, bins = ([step[key] for step in steps] for key in ("prompt", "t", "bin"))
    products = torch.stack([_read(folder / step["name"] / PRODUCTS) for step in steps])
    tokens = read_json(folder / steps[0]["name"] / TOKENS)
    measured = MeasuredProducts(prompts, t, bins, products)
    return ExpertProducts(tuple(manifest["bin_edges"]), steps[0]["branches"], tokens, measured)


def _read(file: Path) -> Tensor:
    try:
        return load_file(file)["products"]
    except (FileNotFoundError, SafetensorError) as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else DamagedFile
        raise kind(f"{file}: missing or damaged ({error}); remove it and run stage sensitivity again") from None
