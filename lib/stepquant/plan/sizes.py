"""Bytes of every artifact, from shapes: exact for tensors and safetensors headers, approximate for JSON.

The size of videos depends on their content; counted is what they cannot exceed by much, their pixels. Left out are
model, metrics and report, which are small.
"""

import json
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Any

import torch

from stepquant.calibration import recorder
from stepquant.calibration.sensitivity import GROUPS
from stepquant.formats import get_format
from stepquant.plan.workload import ExpertRun, SiteShape, Workload, block_ranges, chunks, measured_steps, rows_kept
from stepquant.recipe.precision import ERRORS
from stepquant.recipe.site_files import ClipTable, ResidualFactors, Shapes, TransformFactors
from stepquant.recipe.variants import VARIANTS
from stepquant.runtime.layout import QuantizationSettings, linear_layout
from stepquant.storage.json_files import to_json
from stepquant.storage.safetensors_stream import NAMES

# Bytes of the zarr.json of an array and of a group of ours, as zarr 3.1.6 writes them.
ARRAY_METADATA, GROUP_METADATA = 540, 290
ERROR = 0.04644073173403740  # a float of typical length in a record
SQUARED_ERROR = 0.0001050127665084761  # and in a precision schedule
DIGEST = 64


@dataclass(frozen=True)
class Size:
    """Bytes and number of files of one artifact."""

    bytes: int
    files: int


def artifact_sizes(run: Workload) -> dict[str, Size]:
    """Path below artifacts/ -> size. The checkpoint is that of variant `full`."""
    sizes = {"trajectories.zarr": trajectories(run)}
    for expert in run.experts:
        sizes |= {
            f"activations/{expert.name}.zarr": activations(run, expert),
            f"lowrank/{expert.name}": lowrank(run, expert),
            f"residual/{expert.name}": residual(run, expert),
            f"clip/{expert.name}": clip(run, expert),
            f"sensitivity/{expert.name}": sensitivity(run, expert),
        }
    return sizes | {"schedule.json": schedule(run), "checkpoints/full": checkpoint(run)}


def trajectories(run: Workload, sampled: bool = True) -> Size:
    """Per prompt: the arguments of every call without repetitions (calibration/trajectory_files.py).

    Args:
        run: The workload.
        sampled: Whether the samples are there with which a replay is compared. Made-up calls have none.
    """
    inputs, text = run.inputs, run.parameter("sampling").max_sequence_length * run.inputs.text_dim
    branches, steps = run.experts[0].branches, sum(sum(expert.steps) for expert in run.experts)
    condition, image = inputs.in_channels - inputs.out_channels, run.model.image_tokens * run.model.image_dim
    latents = prod(run.latents)
    values = (steps * inputs.out_channels + condition) * latents + branches * text + image
    arrays, files = (
        4,
        steps + branches + 2 + 4 + 2,
    )  # files: latents by step, text by branch, t twice, zarr.json of each
    arrays, files = arrays + bool(condition) + bool(image), files + 2 * bool(condition) + 2 * bool(image) - 1
    if sampled:
        values += sum(sum(e.steps) * e.branches * _samples(run, e, inputs.out_channels * latents) for e in run.experts)
        arrays, files = arrays + 2 * len(run.experts), files + 4 * len(run.experts)
    times = steps * (4 * branches + (4 * run.tokens if run.model.token_timesteps else 8))
    metadata = arrays * ARRAY_METADATA + GROUP_METADATA + 24 * steps * branches  # the names of the calls' experts
    prompts = run.recorded_prompts
    recorded = Size(prompts * (values * run.itemsize + times + metadata + DIGEST) + GROUP_METADATA, prompts * files + 1)
    if not run.captions:
        return recorded
    captions = run.captions * text * run.itemsize + ARRAY_METADATA + GROUP_METADATA + DIGEST
    return Size(recorded.bytes + captions, recorded.files + 2 + run.captions)  # a chunk per caption


def _samples(run: Workload, expert: ExpertRun, output: int) -> int:
    """Values of one call that are kept to compare a replay with: of every block's output, and of the denoiser's."""
    block = min(recorder.TOKENS, run.tokens) * min(recorder.CHANNELS, expert.width)
    return expert.blocks * block + min(recorder.VALUES, output)


def activations(run: Workload, expert: ExpertRun) -> Size:
    """Per block and site: Hessian, channel statistics and samples (calibration/statistics_files.py)."""
    block = 0
    for site in expert.sites:
        bins = len(expert.steps) if site.per_bin else 1
        tensors = 4 * site.K * (site.K + 2 + 2 * bins) + rows_kept(run, expert, site) * site.K * run.itemsize
        block += tensors + 3 * ARRAY_METADATA + GROUP_METADATA
    return Size(expert.blocks * block, expert.blocks * len(expert.sites) * 7 + 2)


def hidden_states(run: Workload, expert: ExpertRun) -> Size:
    """Scratch of capture: the outputs of a block range, the input of the next one.

    While a range is computed, its inputs exist as well. The last range has no outputs.
    """
    kept = min(2, block_ranges(run, expert) - 1)
    return Size(kept * expert.all_calls * hidden_state(run, expert), kept * chunks(run, expert))


def hidden_state(run: Workload, expert: ExpertRun) -> int:
    """Bytes of one call's hidden states."""
    return run.tokens * expert.width * run.itemsize


def shard_sums(run: Workload, expert: ExpertRun) -> Size:
    """Scratch of capture: the sums of every shard with calibration calls, of two block ranges while one is computed.

    The calls of calibration prompts come first, so they fill whole shards.
    """
    blocks = min(expert.blocks, 2 * run.parameter("capture").blocks_per_shard)
    files = blocks * ceil(expert.calls("calibration") / run.parameter("capture").calls_per_shard)
    return Size(files * sum(4 * site.K**2 for site in expert.sites), files * len(expert.sites))


def lowrank(run: Workload, expert: ExpertRun) -> Size:
    """Per block: transform and low-rank branch of every site."""
    settings, rank = run.parameter("smooth", expert.name), run.parameter("lowrank", expert.name).rank
    candidates = len(settings.candidates) if settings.alpha == "search" else 1
    rotations = len(run.parameter("rotate", expert.name).hadamard_sizes)
    record = {
        "alpha": 0.5,
        "beta": 0.5,
        "candidates": [[0.5, 0.5]] * candidates,
        "search_errors": [ERROR] * candidates,
        "rotation": 64,
        "rotations": [64] * rotations,
        "rotation_errors": [ERROR] * rotations,
        "learned": True,
    }

    return _blocks(expert, lambda site: TransformFactors.shapes(site.N, site.K, rank), record)


def residual(run: Workload, expert: ExpertRun) -> Size:
    """Per block: codes, scales, refitted low-rank branch and offset of every site."""
    formats, rank = run.parameter("format"), run.parameter("lowrank", expert.name).rank
    dampings = run.parameter("gptq", expert.name).dampings
    record = {
        "damping": dampings[0],
        "dampings": dampings,
        "validation_errors": [ERROR] * min(2, len(dampings)),
        "retries": 0,
        "dead_channels": 0,
    }
    return _blocks(
        expert, lambda site: ResidualFactors.shapes(site.N, site.K, rank, get_format(formats.weight)), record
    )


def clip(run: Workload, expert: ExpertRun) -> Size:
    """Per block: the clip of every site and bin, mostly JSON."""
    settings = run.parameter("clip", expert.name)
    offsets = settings.exponent_offsets if run.parameter("format").activation == "mxfp4" else [0]
    candidates = [[ratio, offset] for ratio in settings.ratios for offset in offsets]

    def count(site: SiteShape) -> int:
        return len(expert.steps) if site.per_bin else 1

    def record(site: SiteShape) -> dict[str, Any]:
        bins = count(site)
        return {
            "candidates": candidates,
            "search_errors": [[ERROR] * len(candidates)] * bins,
            "chosen": [0] * bins,
            "single": 0,
        }

    return _blocks(expert, lambda site: ClipTable.shapes(count(site)), record)


def sensitivity(run: Workload, expert: ExpertRun) -> Size:
    """Per measured step: products and numbers of tokens (calibration/sensitivity.py), and the manifest."""
    steps, settings = measured_steps(run, expert), run.parameter("sensitivity")
    shape = (settings.probes, len(ERRORS), expert.blocks, len(expert.sites), GROUPS)
    tokens = to_json({site.name: site.tokens for site in expert.sites})
    listed = {"name": "calibration_00-0000", "prompt": "calibration_00", "t": 857.0, "bin": 0, "branches": 2}
    manifest = to_json({"bin_edges": [900.0] * (len(expert.steps) + 1), "steps": [listed] * steps})
    each = safetensors_bytes({"products": (shape, torch.float32)}) + len(tokens)
    return Size(steps * each + len(manifest), 2 * steps + 1)


def schedule(run: Workload) -> Size:
    """The errors of all slots as text, and those that take 8 bits: of all slots the share that the budget is."""
    budget = run.parameter("precision").activation_budget

    def record(expert: ExpertRun) -> dict[str, Any]:
        bins, sites = len(expert.steps), [site.name for site in expert.sites]
        slots = list(product(range(expert.blocks), sites, range(bins)))
        eight_bit: dict[int, dict[str, list[int]]] = {}
        for block, site, b in slots[: round(budget * len(slots))]:
            eight_bit.setdefault(block, {}).setdefault(site, []).append(b)
        return {
            "bin_edges": [900.0] * (bins + 1),
            "sites": sites,
            "eight_bit": eight_bit,
            "errors": dict.fromkeys(ERRORS, [[[SQUARED_ERROR] * len(sites)] * expert.blocks] * bins),
            "cost": [[float(2 * site.weights * site.tokens) for site in expert.sites]] * bins,
        }

    experts = {expert.name: record(expert) for expert in run.experts}
    named = {"eight_bit_format": "int8", "budget": budget, "share": ERROR, "experts": experts}
    return Size(len(to_json(named)), 1)


def videos(run: Workload) -> Size:
    """The evaluation videos of one variant, without compression."""
    sampling, prompts = run.parameter("sampling"), run.prompts["evaluation"]
    return Size(prompts * 3 * sampling.num_frames * sampling.height * sampling.width, prompts)


def checkpoint(run: Workload, variant: str = "full") -> Size:
    """A packed pipeline folder, with the other components copied."""
    sizes = [packed_expert(run, expert, variant) for expert in run.experts]
    return Size(run.model.other_stored_bytes + sum(size.bytes for size in sizes), sum(size.files for size in sizes))


def packed_expert(run: Workload, expert: ExpertRun, variant: str = "full") -> Size:
    """The folder of one quantized denoiser. Loaded it takes as much memory."""
    formats, recipe = run.parameter("format"), VARIANTS[variant]
    targets = {f"blocks.0.{path}": shape for site in expert.sites for path, shape in site.linears.items()}
    settings = QuantizationSettings(
        weight_format=formats.weight,
        activation_format=formats.activation if recipe.activations else None,
        activation_rounding=formats.e8m0_activation,
        activation_scales=formats.activation_scales,
        rank=run.parameter("lowrank", expert.name).rank if recipe.low_rank else 0,
        mean_subtraction=run.parameter("center", expert.name).means and recipe.low_rank,
        rotations={},
        bin_edges=tuple(range(len(expert.steps) if recipe.clip == "per_bin" else 1, -1, -1)),
        targets=tuple(targets),
    )
    tensors: Shapes = {}
    for target, shape in targets.items():
        tensors |= {f"{target}.{name}": value for name, value in linear_layout(settings, *shape).items()}
    # Per block also biases, norms and modulation; outside the blocks about 20 tensors.
    names = expert.blocks * (len(tensors) + len(targets) + 10) + 20
    texts = names * 95 + expert.blocks * len(targets) * 50
    # In the dtype of the arithmetic if that is narrower than the source's; what stays float32 as it is in the source.
    stored = max(2, run.model.stored_itemsize(expert.name))
    narrow = min(stored, run.itemsize)
    biases = expert.blocks * sum(rows for rows, _ in targets.values())  # float32 in every checkpoint
    rest = round(expert.rest_bytes(narrow, stored) + biases * (4 - narrow))
    return Size(expert.blocks * safetensors_bytes(tensors) + rest + texts, expert.blocks + 3)


def safetensors_bytes(tensors: Shapes) -> int:
    """Size of a safetensors file without metadata."""
    entries, offset = {}, 0
    # safetensors orders the tensors by the size of their values, then by name.
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        end = offset + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = len(json.dumps(entries, separators=(",", ":")))
    return 8 + -(-header // 8) * 8 + offset


def _blocks(expert: ExpertRun, tensors: Any, record: Any) -> Size:
    """factors.safetensors and record.json per block, and the manifest.

    tensors: site -> its shapes. record: site -> its record, or the record of every site.
    """
    factors = {f"{site.name}.{key}": value for site in expert.sites for key, value in tensors(site).items()}
    records = {site.name: record(site) if callable(record) else record for site in expert.sites}
    each = safetensors_bytes(factors) + len(json.dumps(records, indent=2))
    manifest = expert.blocks * (DIGEST + 22) + 40
    return Size(expert.blocks * each + manifest, 2 * expert.blocks + 1)
