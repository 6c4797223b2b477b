"""Bytes of every artifact, from shapes: exact for tensors and safetensors headers, close for the JSON beside them.

Videos are left out: how well frames compress depends on what is on them. So are model, metrics and report, which are small.
"""

import json
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch

from stepquant.checkpoint.layout import QuantizationSettings, linear_layout
from stepquant.formats import get_format
from stepquant.plan.run import ExpertRun, Run, SiteShape, chunks, rows_kept, runs

# Bytes of one zarr.json of an array and of a group, as zarr 3.1.6 writes them for ours.
ARRAY_METADATA, GROUP_METADATA = 540, 290
ERROR = 0.04644073173403740  # a float of usual length in a record
DIGEST = 64
CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8", torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3"}

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Size:
    """bytes and files of one artifact."""

    bytes: int
    files: int


def artifact_sizes(run: Run) -> dict[str, Size]:
    """Every artifact by its path below artifacts/; a checkpoint is that of variant `full`."""
    sizes = {"trajectories.zarr": trajectories(run)}
    for expert in run.experts:
        sizes |= {
            f"activations/{expert.name}.zarr": activations(run, expert),
            f"lowrank/{expert.name}": lowrank(run, expert),
            f"residual/{expert.name}": residual(run, expert),
            f"clip/{expert.name}": clip(run, expert),
        }
    return sizes | {"checkpoints/full": checkpoint(run)}


def trajectories(run: Run) -> Size:
    """Per prompt: latents of every step, condition and text embeddings (calibration/trajectories.py)."""
    inputs, (frames, height, width), sampling = run.inputs, run.latents, run.knob("sampling")
    branches, steps = run.experts[0].branches, sum(sum(expert.steps) for expert in run.experts)
    condition = inputs["in_channels"] - inputs["out_channels"]
    values = (steps * inputs["out_channels"] + condition) * frames * height * width
    values += branches * sampling.max_sequence_length * inputs["text_dim"]
    prompts = run.recorded_prompts
    names = 24 * steps  # each step's expert stands in the attributes
    each = values * run.itemsize + 4 * steps + 4 * ARRAY_METADATA + GROUP_METADATA + names
    return Size(prompts * (each + DIGEST) + GROUP_METADATA, prompts * (steps + condition + branches + 6) + 1)


def activations(run: Run, expert: ExpertRun) -> Size:
    """Per block and site: second moments, channel statistics and samples (calibration/activations.py)."""
    block = 0
    for site in expert.sites:
        bins = len(expert.steps) if site.per_bin else 1
        tensors = 4 * site.K * (site.K + 1 + 2 * bins) + rows_kept(run, expert, site) * site.K * run.itemsize
        block += tensors + 3 * ARRAY_METADATA + GROUP_METADATA
    return Size(expert.blocks * block, expert.blocks * len(expert.sites) * 7 + 2)


def hidden_states(run: Run, expert: ExpertRun) -> Size:
    """Scratch of capture: what a run of blocks leaves for the next one, of two runs while one works; the last one leaves nothing."""
    kept = min(2, runs(run, expert) - 1)
    return Size(kept * expert.all_calls * hidden_state(run, expert), kept * chunks(run, expert))


def hidden_state(run: Run, expert: ExpertRun) -> int:
    """Bytes that one call takes from block to block."""
    return run.tokens * expert.width * run.itemsize


def share_sums(run: Run, expert: ExpertRun) -> Size:
    """Scratch of capture: the sums of every share with calibration calls, of two runs of blocks while one works; these prompts come first."""
    blocks = min(expert.blocks, 2 * run.knob("capture").blocks_per_share)
    files = blocks * ceil(expert.calls("calibration") / run.knob("capture").calls_per_share)
    return Size(files * sum(4 * site.K**2 for site in expert.sites), files * len(expert.sites))


def lowrank(run: Run, expert: ExpertRun) -> Size:
    """Per block: transform and branch of every site."""
    settings, rank = run.knob("smooth", expert.name), run.knob("lowrank", expert.name).rank
    candidates = len(settings.candidates) if settings.alpha == "search" else 1
    rotations = len(run.knob("rotate", expert.name).blocks)
    record = {
        "alpha": 0.5, "beta": 0.5, "candidates": [[0.5, 0.5]] * candidates, "search_errors": [ERROR] * candidates,
        "rotation": 64, "rotations": [64] * rotations, "rotation_errors": [ERROR] * rotations, "learned": True,
    }

    def tensors(site: SiteShape) -> Tensors:
        vector = ((site.K,), torch.bfloat16)
        branch = {"proj_down": ((site.K, rank), torch.bfloat16), "proj_up": ((site.N, rank), torch.bfloat16)}
        return {"mean": vector, "smooth": vector, "rotation": ((), torch.int64)} | branch

    return _blocks(expert, tensors, record)


def residual(run: Run, expert: ExpertRun) -> Size:
    """Per block: codes, scales, refitted branch and offset of every site."""
    formats, rank = run.knob("format"), run.knob("lowrank", expert.name).rank
    group, dtype = get_format(formats.weight).group, _scale_dtype(formats.weight)

    def tensors(site: SiteShape) -> Tensors:
        found = {"codes": ((site.N, site.K // 2), torch.uint8), "scales": ((site.N, site.K // group), dtype), "offset": ((site.N,), torch.float32)}
        found |= {"proj_down": ((site.K, rank), torch.bfloat16), "proj_up": ((site.N, rank), torch.bfloat16)}
        return found | ({"tensor_scale": ((), torch.float32)} if formats.weight == "nvfp4" else {})

    dampings = run.knob("gptq", expert.name).dampings
    record = {"damping": dampings[0], "dampings": dampings, "validation_errors": [ERROR] * min(2, len(dampings)), "retries": 0, "dead_channels": 0}
    return _blocks(expert, tensors, record)


def clip(run: Run, expert: ExpertRun) -> Size:
    """Per block: the clip of every site and bin. Mostly records."""
    settings = run.knob("clip", expert.name)
    offsets = settings.exponent_offsets if run.knob("format").activation == "mxfp4" else [0]
    candidates = [[ratio, offset] for ratio in settings.ratios for offset in offsets]

    def tensors(site: SiteShape) -> Tensors:
        bins = (len(expert.steps) if site.per_bin else 1,)
        return {f"{kind}{name}": (bins, dtype) for kind in ("", "single_") for name, dtype in (("ratio", torch.float32), ("exponent", torch.int8))}

    def record(site: SiteShape) -> dict[str, Any]:
        bins = len(expert.steps) if site.per_bin else 1
        return {"candidates": candidates, "search_errors": [[ERROR] * len(candidates)] * bins, "chosen": [0] * bins, "single": 0}

    return _blocks(expert, tensors, record)


def checkpoint(run: Run) -> Size:
    """A packed pipeline folder of variant `full`, with the other components copied."""
    sizes = [packed_expert(run, expert) for expert in run.experts]
    return Size(run.other_bytes + sum(size.bytes for size in sizes), sum(size.files for size in sizes))


def packed_expert(run: Run, expert: ExpertRun) -> Size:
    """One quantized denoiser's folder, which is also what it takes in memory once loaded in BF16."""
    formats = run.knob("format")
    targets = {f"blocks.0.{path}": shape for site in expert.sites for path, shape in site.linears.items()}
    settings = QuantizationSettings(
        weight_format=formats.weight, activation_format=formats.activation, activation_rounding=formats.e8m0_activation,
        rank=run.knob("lowrank", expert.name).rank, centred=run.knob("centre", expert.name).means, rotations={},
        bin_edges=tuple(range(len(expert.steps), -1, -1)), targets=tuple(targets),
    )
    tensors: Tensors = {}
    for target, shape in targets.items():
        tensors |= {f"{target}.{name}": value for name, value in linear_layout(settings, *shape).items()}
    names = expert.blocks * (len(tensors) + len(targets) + 10) + 20  # biases, norms and modulation; what stands outside the blocks
    texts = names * 95 + expert.blocks * len(targets) * 50
    return Size(expert.blocks * safetensors_bytes(tensors) + expert.rest_bytes + texts, expert.blocks + 3)


def safetensors_bytes(tensors: Tensors) -> int:
    """Size of a safetensors file without metadata."""
    entries, offset = [], 0
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):  # as safetensors lays them out
        size = prod(shape) * dtype.itemsize
        entries.append(f'"{name}":{{"dtype":"{CODES[dtype]}","shape":[{",".join(map(str, shape))}],"data_offsets":[{offset},{offset + size}]}}')
        offset += size
    header = len(",".join(entries)) + 2
    return 8 + -(-header // 8) * 8 + offset


def _blocks(expert: ExpertRun, tensors: Any, record: Any) -> Size:
    """Blocks of factors.safetensors and record.json, and the manifest. tensors, record: of a site; a record may be the same for all."""
    factors = {f"{site.name}.{key}": value for site in expert.sites for key, value in tensors(site).items()}
    records = {site.name: record(site) if callable(record) else record for site in expert.sites}
    each = safetensors_bytes(factors) + len(json.dumps(records, indent=2))
    manifest = expert.blocks * (DIGEST + 22) + 40
    return Size(expert.blocks * each + manifest, 2 * expert.blocks + 1)


def _scale_dtype(weight_format: str) -> torch.dtype:
    return {"int4": torch.bfloat16, "mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}[weight_format]
