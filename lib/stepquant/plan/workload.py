"""What would run: the model's shapes, the params, and how many calls of which size are recorded. Nothing is loaded."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

from stepquant.errors import UserError
from stepquant.models.bins import expert_bins
from stepquant.models.manifest import (
    Compression,
    DenoiserInputs,
    ExpertManifest,
    ModelManifest,
    SiteManifest,
    read_manifest,
)
from stepquant.models.sites import WAN_SITES
from stepquant.models.source import COMPRESSION, EXPERT_FOLDERS, describe_experts

# Prompts per split where the params take all and the manifest of prompts isn't there to be counted.
ASSUMED_PROMPTS = {"calibration": 8, "validation": 2, "heldout": 4, "evaluation": 16}
RECORDED = ("calibration", "validation", "heldout")  # splits whose trajectories are recorded and replayed
LAST_SIGMA = 1e-3  # of diffusers' UniPC schedule before the shift


@dataclass(frozen=True)
class SiteShape:
    """One site of a block: linears by module path -> (N, K), and how many tokens a call brings."""

    name: str
    linears: dict[str, tuple[int, int]]
    per_bin: bool
    tokens: int

    @property
    def N(self) -> int:
        """Rows of the stacked weight."""
        return sum(rows for rows, _ in self.linears.values())

    @property
    def K(self) -> int:
        return next(iter(self.linears.values()))[1]

    @property
    def weights(self) -> int:
        return self.N * self.K


@dataclass(frozen=True)
class ExpertRun:
    """One expert: its sites, and its recorded calls. steps: per bin and prompt; branches: calls per step."""

    name: str
    subfolder: str
    blocks: int
    sites: tuple[SiteShape, ...]
    bf16_bytes: int
    steps: tuple[int, ...]
    branches: int
    prompts: dict[str, int]
    steps_per_bin: int | None

    @property
    def weights(self) -> int:
        """Weights of the quantized linears, all blocks."""
        return self.blocks * sum(site.weights for site in self.sites)

    @property
    def rest_bytes(self) -> int:
        """What stays unquantized, in BF16."""
        return self.bf16_bytes - 2 * self.weights

    @property
    def width(self) -> int:
        return self.sites[0].K

    def calls(self, split: str, b: int | None = None) -> int:
        """Replayed calls of a split, in one bin or in all."""
        replayed = [steps if self.steps_per_bin is None else min(steps, self.steps_per_bin) for steps in self.steps]
        return self.prompts[split] * self.branches * (sum(replayed) if b is None else replayed[b])

    @property
    def all_calls(self) -> int:
        return sum(map(self.calls, RECORDED))


@dataclass(frozen=True)
class Workload:
    """A model under some params. parameter(section, expert) gives a validated section; other_bytes: the pipeline's other components."""

    manifest: ModelManifest
    other_bytes: int
    parameter: Callable[..., Any]

    @cached_property
    def prompts(self) -> dict[str, int]:
        """Prompts per split: as the params say, as the manifest of prompts has, or as assumed."""
        trajectories, generate = self.parameter("trajectories"), self.parameter("generate")
        recorded = {
            split: _count(getattr(trajectories, f"{split}_prompts"), Path(trajectories.manifest), split)
            for split in RECORDED
        }
        return recorded | {"evaluation": _count(generate.prompts, Path(generate.manifest), "evaluation")}

    @property
    def recorded_prompts(self) -> int:
        """Prompts that trajectories are recorded of."""
        return sum(self.prompts[split] for split in RECORDED)

    @property
    def itemsize(self) -> int:
        """Bytes of a value in the dtype of the arithmetic."""
        return 4 if self.parameter("compute").dtype == "float32" else 2

    @cached_property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, height and width of one video."""
        sampling, compression = self.parameter("sampling"), self.manifest.compression
        spatial, temporal = compression.scale_factor_spatial, compression.scale_factor_temporal
        return (sampling.num_frames - 1) // temporal + 1, sampling.height // spatial, sampling.width // spatial

    @property
    def inputs(self) -> DenoiserInputs:
        """Channels, text width and patch of the denoiser's inputs; both experts have the same."""
        return next(iter(self.manifest.experts.values())).inputs

    @property
    def tokens(self) -> int:
        """Tokens of one call: one per patch of the latents."""
        return prod(n // patch for n, patch in zip(self.latents, self.inputs.patch_size))

    @cached_property
    def experts(self) -> list[ExpertRun]:
        return [self._expert(name, described) for name, described in self.manifest.experts.items()]

    def _expert(self, name: str, described: ExpertManifest) -> ExpertRun:
        sampling, (low, high) = self.parameter("sampling"), described.t_range
        bins = expert_bins(self.parameter("bins").by_expert, name, described.t_range)
        inside = [t for t in timesteps(sampling.steps, sampling.flow_shift) if low <= t < high or t == high]
        steps = [0] * bins.count
        for t in inside:
            steps[bins.index(t)] += 1
        sites = [self._site(site, shape) for site, shape in described.sites.items()]
        branches = 2 if sampling.guidance_scale > 1 else 1
        return ExpertRun(
            name,
            described.subfolder,
            described.blocks,
            tuple(sites),
            described.bf16_bytes,
            tuple(steps),
            branches,
            self.prompts,
            self.parameter("capture").steps_per_bin,
        )

    def _site(self, name: str, described: SiteManifest) -> SiteShape:
        per_bin = described.depends_on_timestep
        return SiteShape(
            name, described.linears, per_bin, self.tokens if per_bin else self.parameter("sampling").max_sequence_length
        )


def timesteps(steps: int, shift: float) -> list[float]:
    """t of each sampling step, noisiest first, under a flow shift."""
    sigmas = (1 - i / steps * (1 - LAST_SIGMA) for i in range(steps))
    return [1000 * shift * s / (1 + (shift - 1) * s) for s in sigmas]


def find_model(source: str, revision: str | None, recorded: Path) -> tuple[ModelManifest, int]:
    """Experts and shapes of a source model, and the bytes of its other components, without loading or downloading anything.

    recorded: the manifest that stage model wrote, taken if it is of this source. Else a local folder's headers are read, or the
    shapes are known. Raises UserError if there is none of these.
    """
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        found = describe_experts(folder, source, revision)
    elif source in KNOWN:
        found = KNOWN[source]
    elif recorded.is_file() and read_manifest(recorded).source == source:
        found = read_manifest(recorded)
    else:
        raise UserError(
            f"model.source: {source} is neither a local folder nor known here; run `stepquant model`, which downloads and describes it"
        )
    return found, OTHER_BYTES.get(source, 0) or _other_bytes(folder, found)


def _other_bytes(folder: Path, manifest: ModelManifest) -> int:
    """Bytes of a local pipeline's components other than the experts."""
    experts = {described.subfolder for described in manifest.experts.values()}
    files = (
        path for path in folder.glob("*/**/*") if path.is_file() and path.relative_to(folder).parts[0] not in experts
    )
    return sum(path.stat().st_size for path in files)


def _count(wanted: int | None, manifest: Path, split: str) -> int:
    if wanted is not None:
        return wanted
    if not manifest.is_file():
        return ASSUMED_PROMPTS[split]
    rows = (json.loads(line) for line in manifest.read_text(encoding="utf-8").split("\n") if line.strip())
    return sum(row.get("split") == split for row in rows)


def wan_expert(
    subfolder: str, t_range: tuple[float, float], *, blocks: int, width: int, ffn: int, text_dim: int, bf16_bytes: int
) -> ExpertManifest:
    """One expert of a WanTransformer3DModel as the model manifest describes it."""
    shapes = {"ffn.net.0.proj": (ffn, width), "ffn.net.2": (width, ffn)}
    sites = {
        site.name: SiteManifest(
            depends_on_timestep=site.depends_on_timestep,
            linears={path: shapes.get(path, (width, width)) for path in site.linears},
        )
        for site in WAN_SITES
    }
    inputs = DenoiserInputs(in_channels=36, out_channels=16, patch_size=(1, 2, 2), text_dim=text_dim)
    return ExpertManifest(
        subfolder=subfolder, t_range=t_range, blocks=blocks, sites=sites, inputs=inputs, bf16_bytes=bf16_bytes
    )


# 14,288,901,184 parameters an expert (the files of the hub agree); text encoder 11.36 GB in BF16, VAE 0.51 GB in float32.
_A14B = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
_A14B_EXPERT = {"blocks": 40, "width": 5120, "ffn": 13824, "text_dim": 4096, "bf16_bytes": 2 * 14_288_901_184}
_A14B_RANGES = {"high_noise": (900.0, 1000.0), "low_noise": (0.0, 900.0)}
KNOWN = {
    _A14B: ModelManifest(
        source=_A14B,
        revision=None,
        pipeline="WanImageToVideoPipeline",
        num_train_timesteps=1000,
        compression=Compression.model_validate(COMPRESSION),
        experts={
            name: wan_expert(subfolder, _A14B_RANGES[name], **_A14B_EXPERT)
            for name, subfolder in EXPERT_FOLDERS.items()
        },
    )
}
OTHER_BYTES = {_A14B: 11_870_000_000}


def rows_kept(run: Workload, expert: ExpertRun, site: SiteShape) -> int:
    """Sampled tokens of a site, all splits, all bins."""
    heldout = _sampled(expert, site, "heldout", run.parameter("capture").heldout_tokens)
    return search_rows(run, expert, site) + validation_rows(run, expert, site) + heldout


def search_rows(run: Workload, expert: ExpertRun, site: SiteShape) -> int:
    """Sampled calibration tokens of a site, all bins."""
    return _sampled(expert, site, "calibration", run.parameter("capture").search_tokens)


def validation_rows(run: Workload, expert: ExpertRun, site: SiteShape) -> int:
    """Sampled validation tokens of a site, all bins."""
    return _sampled(expert, site, "validation", run.parameter("capture").search_tokens)


def _sampled(expert: ExpertRun, site: SiteShape, split: str, wanted: int) -> int:
    if not site.per_bin:  # the text of each prompt and branch counts once
        return min(wanted, expert.prompts[split] * expert.branches * site.tokens)
    return sum(min(wanted, expert.calls(split, b) * site.tokens) for b in range(len(expert.steps)))


def runs(run: Workload, expert: ExpertRun) -> int:
    """Runs of blocks that capture cuts an expert into."""
    return ceil(expert.blocks / run.parameter("capture").blocks_per_shard)


def summed_tokens(run: Workload, expert: ExpertRun, site: SiteShape) -> float:
    """Calibration tokens of a site that go into its second moments."""
    if not site.per_bin:
        return expert.prompts["calibration"] * expert.branches * site.tokens
    return expert.calls("calibration") * site.tokens / run.parameter("capture").hessian_stride


def chunks(run: Workload, expert: ExpertRun) -> int:
    """Files of hidden states that one run of blocks leaves for the next."""
    return ceil(expert.all_calls / run.parameter("capture").calls_per_chunk)
