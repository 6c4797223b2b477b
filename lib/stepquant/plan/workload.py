"""The work of a run: the model's shapes, the parameters, and the number and size of the calls. Loads no weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

from stepquant.models.bins import expert_bins
from stepquant.models.captions import read_captions
from stepquant.models.checks.reach import steps_of
from stepquant.models.checks.scheduler import sampler_timesteps
from stepquant.models.manifest import DenoiserInputs, ExpertManifest, ModelManifest, SiteManifest
from stepquant.params import Capture, Sensitivity, Trajectories
from stepquant.plan.source_model import SourceModel

# Prompts per split if the parameters take all and the manifest of prompts is not there to be counted.
ASSUMED_PROMPTS = {"calibration": 8, "validation": 2, "heldout": 4, "evaluation": 16}
RECORDED = ("calibration", "validation", "heldout")  # splits whose trajectories are recorded and replayed
IMAGE_SITE = "attn2.add_kv"  # reads image tokens, as the other site that does not depend on t reads text


@dataclass(frozen=True)
class SiteShape:
    """One site of a block.

    Attributes:
        name: Name of the site.
        described: Its linears, and whether its input depends on the timestep.
        tokens: Tokens per call.
    """

    name: str
    described: SiteManifest
    tokens: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module path -> (N, K)."""
        return self.described.linears

    @property
    def per_bin(self) -> bool:
        """Whether its input depends on the timestep."""
        return self.described.depends_on_timestep

    @property
    def N(self) -> int:
        """Rows of the stacked weight."""
        return self.described.rows

    @property
    def K(self) -> int:
        """Input channels."""
        return self.described.columns

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.N * self.K


@dataclass(frozen=True)
class ExpertRun:
    """One expert and its recorded calls.

    Attributes:
        name: Name of the expert.
        subfolder: Its folder in the pipeline.
        blocks: Number of transformer blocks.
        sites: The sites of a block.
        bf16_bytes: Bytes of all its weights in BF16.
        steps: Recorded steps per prompt, by bin.
        float32_values: Weights that stay float32 whatever `compute.dtype` is.
        branches: Calls per step: 2 with guidance, else 1.
        prompts: Split -> number of prompts.
        captions: Number of captions, which calibrate the sites that read text alone.
        steps_per_bin: At most so many steps per prompt and bin are replayed; None for all.
    """

    name: str
    subfolder: str
    blocks: int
    sites: tuple[SiteShape, ...]
    bf16_bytes: int
    float32_values: int
    steps: tuple[int, ...]
    branches: int
    prompts: dict[str, int]
    captions: int
    steps_per_bin: int | None

    @property
    def weights(self) -> int:
        """Number of weights in the quantized linears of all blocks."""
        return self.blocks * sum(site.weights for site in self.sites)

    def rest_bytes(self, itemsize: float, kept_itemsize: float = 4) -> float:
        """Bytes of what stays unquantized. kept_itemsize: bytes per value of what diffusers keeps in float32."""
        values = self.bf16_bytes // 2 - self.weights
        return values * itemsize + self.float32_values * (kept_itemsize - itemsize)

    def loaded_bytes(self, itemsize: int) -> float:
        """Bytes of all weights in memory."""
        return self.weights * itemsize + self.rest_bytes(itemsize)

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return self.sites[0].K

    def texts(self, split: str, site: SiteShape) -> int:
        """How often the tokens of a site that does not depend on t count: once per prompt, branch and caption."""
        captions = self.captions if split == "calibration" and site.described.text_alone else 0
        return self.prompts[split] * self.branches + captions

    def calls(self, split: str, b: int | None = None) -> int:
        """Replayed calls of a split, in bin b or in all bins."""
        replayed = [steps if self.steps_per_bin is None else min(steps, self.steps_per_bin) for steps in self.steps]
        return self.prompts[split] * self.branches * (sum(replayed) if b is None else replayed[b])

    @property
    def all_calls(self) -> int:
        """Replayed calls of all splits."""
        return sum(map(self.calls, RECORDED))


@dataclass(frozen=True)
class Workload:
    """A model under some parameters.

    Attributes:
        model: The model.
        parameter: (section, expert=None) -> the validated section.
    """

    model: SourceModel
    parameter: Callable[..., Any]

    @property
    def manifest(self) -> ModelManifest:
        """The model's manifest."""
        return self.model.manifest

    @cached_property
    def prompts(self) -> dict[str, int]:
        """Prompts per split: from the parameters, else from the manifest of prompts, else assumed."""
        trajectories, generate = self.parameter("trajectories"), self.parameter("generate")
        recorded = {
            split: _count(getattr(trajectories, f"{split}_prompts"), Path(trajectories.manifest), split)
            for split in RECORDED
        }
        return recorded | {"evaluation": _count(generate.prompts, Path(generate.manifest), "evaluation")}

    @property
    def recorded_prompts(self) -> int:
        """Prompts whose trajectories are recorded."""
        return sum(self.prompts[split] for split in RECORDED)

    @property
    def itemsize(self) -> int:
        """Bytes of a value in `compute.dtype`."""
        return 4 if self.parameter("compute").dtype == "float32" else 2

    @cached_property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, height and width of one video."""
        sampling, compression = self.parameter("sampling"), self.manifest.compression
        spatial, temporal = compression.scale_factor_spatial, compression.scale_factor_temporal
        return (sampling.num_frames - 1) // temporal + 1, sampling.height // spatial, sampling.width // spatial

    @property
    def inputs(self) -> DenoiserInputs:
        """Channels, text width and patch size of the denoiser's inputs; both experts have the same."""
        return next(iter(self.manifest.experts.values())).inputs

    @property
    def tokens(self) -> int:
        """Tokens of one call: one per patch of the latents."""
        return prod(n // patch for n, patch in zip(self.latents, self.inputs.patch_size))

    @cached_property
    def timesteps(self) -> list[float]:
        """t of every sampling step."""
        sampling = self.parameter("sampling")
        return sampler_timesteps(self.model.scheduler, sampling.steps, sampling.flow_shift)

    @cached_property
    def captions(self) -> int:
        """Captions that calibrate the sites that read text alone."""
        return _count_captions(self.parameter("trajectories"))

    @cached_property
    def experts(self) -> list[ExpertRun]:
        """The experts in the order of the manifest."""
        return [self._expert(name, described) for name, described in self.manifest.experts.items()]

    def _expert(self, name: str, described: ExpertManifest) -> ExpertRun:
        sampling = self.parameter("sampling")
        bins = expert_bins(self.parameter("bins").by_expert, name, described.t_range)
        highest = max(one.t_range[1] for one in self.manifest.experts.values())
        steps = [0] * bins.count
        for t in steps_of(self.timesteps, described.t_range, highest):
            steps[bins.index(t)] += 1
        sites = [self._site(site, shape) for site, shape in described.sites.items()]
        branches = 2 if sampling.guidance_scale > 1 else 1
        return ExpertRun(
            name,
            described.subfolder,
            described.blocks,
            tuple(sites),
            described.bf16_bytes,
            self.model.float32[name],
            tuple(steps),
            branches,
            self.prompts,
            self.captions,
            self.parameter("capture").steps_per_bin,
        )

    def _site(self, name: str, described: SiteManifest) -> SiteShape:
        context: int = self.parameter("sampling").max_sequence_length
        if name == IMAGE_SITE:
            context = self.model.image_tokens
        return SiteShape(name, described, self.tokens if described.depends_on_timestep else context)


def _count_captions(settings: Trajectories) -> int:
    """Captions of the text file that the parameters name; 0 if there is none, or if it is not there."""
    file = None if settings.text_prompts is None else Path(settings.text_prompts)
    return 0 if file is None or not file.is_file() else len(read_captions(file))


def _count(wanted: int | None, manifest: Path, split: str) -> int:
    if wanted is not None:
        return wanted
    if not manifest.is_file():
        return ASSUMED_PROMPTS[split]
    rows = (json.loads(line) for line in manifest.read_text(encoding="utf-8-sig").split("\n") if line.strip())
    return sum(row.get("split") == split for row in rows)


def rows_kept(run: Workload, expert: ExpertRun, site: SiteShape) -> int:
    """Sampled tokens of a site, all splits and bins."""
    return search_rows(run, expert, site) + validation_rows(run, expert, site) + heldout_rows(run, expert, site)


def search_rows(run: Workload, expert: ExpertRun, site: SiteShape) -> int:
    """Sampled calibration tokens of a site, all bins."""
    return _sampled(expert, site, "calibration", run.parameter("capture").search_tokens)


def validation_rows(run: Workload, expert: ExpertRun, site: SiteShape) -> int:
    """Sampled validation tokens of a site, all bins."""
    return _sampled(expert, site, "validation", run.parameter("capture").search_tokens)


def heldout_rows(run: Workload, expert: ExpertRun, site: SiteShape) -> int:
    """Sampled held-out tokens of a site, all bins."""
    return _sampled(expert, site, "heldout", run.parameter("capture").heldout_tokens)


def _sampled(expert: ExpertRun, site: SiteShape, split: str, wanted: int) -> int:
    if not site.per_bin:
        return min(wanted, expert.texts(split, site) * site.tokens)
    return sum(min(wanted, expert.calls(split, b) * site.tokens) for b in range(len(expert.steps)))


def block_ranges(run: Workload, expert: ExpertRun) -> int:
    """Block ranges into which capture divides an expert."""
    settings: Capture = run.parameter("capture")
    return ceil(expert.blocks / settings.blocks_per_shard)


def summed_tokens(run: Workload, expert: ExpertRun, site: SiteShape) -> float:
    """Calibration tokens of a site that enter its Hessian."""
    if not site.per_bin:
        return expert.texts("calibration", site) * site.tokens
    settings: Capture = run.parameter("capture")
    return expert.calls("calibration") * site.tokens / settings.hessian_stride


def measured_steps(run: Workload, expert: ExpertRun) -> int:
    """Recorded steps that stage sensitivity measures: its units of work."""
    settings: Sensitivity = run.parameter("sensitivity")
    per_bin = settings.steps_per_bin
    return settings.prompts * sum(steps if per_bin is None else min(steps, per_bin) for steps in expert.steps)


def chunks(run: Workload, expert: ExpertRun) -> int:
    """Files of hidden states that one block range leaves for the next."""
    settings: Capture = run.parameter("capture")
    return ceil(expert.all_calls / settings.calls_per_chunk)
