"""Predicted against measured: the video error of 37 settings of 8-bit activations.

    python benchmarks/precision_settings.py

Runs the pipeline up to the packed variant `full` and the schedule in a copy of this checkout. Each setting gives some
slots 8-bit activations: an expert, a bin, a site, blocks, or several of these. The prediction is what stage sensitivity
measured, added up over the slots. The measurement samples videos with the packed checkpoint, on evaluation prompts that
precision_budget.py does not use (30 to 39). Prints both as multiples of 4-bit activations alone, and their rank
correlation (Spearman).
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stepquant
from benchmarks.batch_sampling import Prepared, decoded
from benchmarks.checkout import temporary_checkout
from stepquant.models.manifest import ModelManifest, read_manifest
from stepquant.models.prompts import Prompt, evaluation_prompts
from stepquant.models.sampling import ready_to_sample
from stepquant.params import Sampling, section
from stepquant.recipe.schedule_file import Schedule, read_schedule

Slots = dict[str, dict[int, dict[str, list[int]]]]  # by expert, block and site: the bins
PROMPTS = slice(30, 40)
EVALUATION, PACKED = "data/evaluation/manifest.jsonl", "artifacts/checkpoints/full"


def settings(schedule: Schedule) -> Iterator[tuple[str, Slots]]:
    """Name and slots of every setting, for a model of two experts."""
    everywhere = {name: _all(schedule, name) for name in schedule.experts}
    yield "4 bits everywhere", {}
    yield "everywhere", _slots(everywhere)
    for name, (bins, blocks, sites) in everywhere.items():
        yield name, _slots({name: (bins, blocks, sites)})
        for b in bins:
            yield f"{name} bin {b}", _slots({name: ([b], blocks, sites)})
    low, (bins, blocks, sites) = list(everywhere.items())[-1]
    for site in sites:
        yield site, _slots({name: (bs, ks, [site]) for name, (bs, ks, _) in everywhere.items()})
    for block in blocks:
        yield f"block {block}", _slots({name: (bs, [block], ss) for name, (bs, _, ss) in everywhere.items()})
    pair, last, half = ["attn1.qkv", "ffn.up"], [bins[-1]], len(blocks) // 2
    yield "attn1.qkv and ffn.up", _slots({name: (bs, ks, pair) for name, (bs, ks, _) in everywhere.items()})
    for names in (pair, pair[:1], pair[1:], ["ffn.down"], ["attn1.out"]):
        yield f"{low} last bin, {' and '.join(names)}", _slots({low: (last, blocks, names)})
    yield f"{low} bins but the first", _slots({low: (bins[1:], blocks, sites)})
    yield f"{low} bins but the last", _slots({low: (bins[:-1], blocks, sites)})
    yield f"{low} bins but the first, attn1.qkv and ffn.up", _slots({low: (bins[1:], blocks, pair)})
    yield f"{low} last bin, first half of the blocks", _slots({low: (last, blocks[:half], sites)})
    yield f"{low} last bin, second half of the blocks", _slots({low: (last, blocks[half:], sites)})
    yield f"{low}, first and last block", _slots({low: (bins, [blocks[0], blocks[-1]], sites)})
    yield f"{low}, last two blocks", _slots({low: (bins, blocks[-2:], sites)})
    yield "the schedule", {name: expert.eight_bit for name, expert in schedule.experts.items()}


def _all(schedule: Schedule, expert: str) -> tuple[list[int], list[int], list[str]]:
    found = schedule.experts[expert]
    return list(range(len(found.cost))), list(range(found.blocks)), found.sites


def _slots(chosen: dict[str, tuple[Iterable[int], Iterable[int], Iterable[str]]]) -> Slots:
    return {
        expert: {block: {site: list(bins) for site in sites} for block in blocks}
        for expert, (bins, blocks, sites) in chosen.items()
    }


def predicted(schedule: Schedule, slots: Slots) -> float:
    """The squared error of the final latent that the sensitivity predicts."""
    experts = {
        name: expert.model_copy(update={"eight_bit": slots.get(name, {})}) for name, expert in schedule.experts.items()
    }
    return schedule.model_copy(update={"experts": experts}).predicted_error(eight_bit=True)


def with_slots(packed: Path, folder: Path, manifest: ModelManifest, schedule: Schedule, slots: Slots) -> Path:
    """A checkpoint like a packed one, whose configs say in which bins each linear takes 8 bits; tensors are linked."""
    shutil.copytree(
        packed, folder, copy_function=lambda source, target: Path(target).symlink_to(Path(source).resolve())
    )
    for name, by_block in slots.items():
        expert = manifest.expert(name)
        bins = {
            f"blocks.{block}.{linear}": found
            for block, by_site in by_block.items()
            for site, found in by_site.items()
            for linear in expert.sites[site].linears
            if found
        }
        file = folder / expert.subfolder / "config.json"
        config = json.loads(file.read_text())
        if bins:
            config["quantization_config"] |= {"eight_bit_format": schedule.eight_bit_format, "eight_bit_bins": bins}
        file.unlink()
        file.write_text(json.dumps(config))
    return folder


def pipeline(folder: Path, sampling: Sampling) -> Any:
    """A pipeline of a folder, quantized or not, ready to sample."""
    pipe = ready_to_sample(lambda: stepquant.load_pipeline(folder, dtype="float32"), sampling)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ranks(values: list[float]) -> torch.Tensor:
    """Rank of each value; no two of these errors are equal."""
    return torch.tensor(values).argsort().argsort().double()


def share(schedule: Schedule, slots: Slots) -> float:
    """Share of the multiply-adds that the slots hold."""
    held = total = 0.0
    for name, expert in schedule.experts.items():
        costs = [dict(zip(expert.sites, row)) for row in expert.cost]
        total += expert.blocks * sum(sum(row.values()) for row in costs)
        chosen = (pair for by_site in slots.get(name, {}).values() for pair in by_site.items())
        held += sum(costs[b][site] for site, bins in chosen for b in bins)
    return held / total


def unused_prompts(root: Path) -> list[Prompt]:
    """The evaluation prompts of a checkout that precision_budget.py does not use."""
    every = {"prompts": None, "manifest": str(root / EVALUATION)}
    return evaluation_prompts(section(root / "params.yaml", "generate").model_copy(update=every))[PROMPTS]


def compare(root: Path, scratch: Path) -> None:
    """Print the table of a finished run."""
    schedule = read_schedule(root / "artifacts/schedule.json")
    manifest = read_manifest(root / "artifacts/model/manifest.json")
    sampling = section(root / "params.yaml", "sampling")
    prompts = unused_prompts(root)
    source = pipeline(root / manifest.source, sampling)
    prepared = Prepared.of(source, sampling, prompts)
    print(f"latents of the batch and of single calls differ by {prepared.differs(source):.1g}\n")
    bf16 = decoded(source, prepared.sample(source))
    print("| 8-bit activations | share of multiply-adds | predicted | measured |\n|---|---|---|---|")
    rows: list[tuple[float, float]] = []
    for n, (name, slots) in enumerate(settings(schedule)):
        folder = with_slots(root / PACKED, scratch / str(n), manifest, schedule, slots)
        frames = decoded(source, prepared.sample(pipeline(folder, sampling)))
        error = (frames - bf16).square().mean().item()
        rows.append((predicted(schedule, slots), error))
        ratios = [f"{value / first:.2f}" for value, first in zip(rows[-1], rows[0])]
        print(f"| {name} | {share(schedule, slots):.0%} | {ratios[0]} | {ratios[1]} |", flush=True)
    both = torch.stack([ranks(list(values)) for values in zip(*rows)])
    print(f"\n{len(rows)} settings, {len(prompts)} prompts: rank correlation {torch.corrcoef(both)[0, 1]:.3f}")


def on_finished_run(compare: Callable[[Path, Path], None], description: str) -> None:
    """Call `compare` with a copy of this checkout that has run up to packed variant and schedule, and a scratch folder.

    The program takes no argument but --help, which prints the description.
    """
    argparse.ArgumentParser(description=description.split("\n\n")[0]).parse_args()
    torch.set_num_threads(1)
    with temporary_checkout() as checkout, tempfile.TemporaryDirectory() as scratch:
        checkout.repro("schedule", "pack@full")
        compare(checkout.root, Path(scratch))


if __name__ == "__main__":
    on_finished_run(compare, __doc__)
