"""Recipes and formats against each other, end to end: runs the pipeline once for each in a copy of this checkout.

    python benchmarks/end_to_end.py                      the ablation in every format
    python benchmarks/end_to_end.py --recipes default paper --variants full --prompts 24
                                                         against the paper's recipe
    python benchmarks/end_to_end.py --recipes gptq.noise=0 default gptq.noise=1 --skip 24 --prompts 16 \\
        --formats int4 --variants full                   for choosing: on prompts that no reported number uses

    python benchmarks/end_to_end.py --recipes comfyui_w4a8 --formats asym_w4a8 --variants svdquant full
                                                         for ComfyUI: rounded to nearest, and by GPTQ

Sampling and capture run once, since they do not depend on either. Weights and activations have the same format, but
asym_w4a8 goes with int8_row. Each recipe is compared with the first one, video by video: the difference of PSNR in dB
with its bootstrap interval.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.checkout import Checkout, temporary_checkout
from benchmarks.recipes import activation_of
from stepquant.evaluate.metrics_file import Record, read_records
from stepquant.evaluate.summary import Bootstrap, paired_difference
from stepquant.params import section
from stepquant.report.tables import brief_table, rich_table

FORMATS = ("int4", "mxfp4", "nvfp4")
VARIANTS = ("w4a16", "rtn", "svdquant", "svdquant_gptq", "one_clip", "full")


def measure(checkout: Checkout, recipe: str, fmt: str, variants: list[str], prompts: int, skip: int) -> list[Record]:
    """The metrics of BF16 and of some variants of a recipe in one format."""
    checkout.start_from(recipe)
    checkout.set("format.weight", fmt)
    checkout.set("format.activation", activation_of(fmt))
    checkout.set("generate.prompts", prompts)
    if skip:
        checkout.set(
            "generate.manifest",
            without_first(checkout.root, section(checkout.root / "params.yaml", "generate").manifest, skip),
        )
    metrics = checkout.root / "artifacts" / "metrics"
    shutil.rmtree(metrics, ignore_errors=True)  # of variants that this run does not make
    checkout.repro(*(f"evaluate@{variant}" for variant in ("bf16", *variants)))
    return read_records(metrics)


def without_first(root: Path, manifest: str, skip: int) -> str:
    """A copy of a manifest without its first rows, in the same folder."""
    shorter = Path(manifest).with_name("skipped.jsonl")
    (root / shorter).write_text("\n".join((root / manifest).read_text().splitlines()[skip:]) + "\n")
    return str(shorter)


def differences(records: list[Record], first: list[Record]) -> dict[str, dict[str, float]]:
    """PSNR of each variant minus that of the same variant by the first recipe, over the same videos."""
    psnr = [
        {r.variant: {name: v.psnr for name, v in r.videos.per_video.items()} for r in rs if r.format}
        for rs in (records, first)
    ]
    return {
        variant: paired_difference(values, psnr[1][variant], Bootstrap(2000, 0.95, 0))
        for variant, values in psnr[0].items()
    }


def show(name: str, records: list[Record], first: tuple[str, list[Record]] | None) -> None:
    print(f"\n{name}")
    Console().print(rich_table(brief_table(records)))
    for record in records:
        if record.format:
            psnr = record.videos.psnr
            print(f"{record.variant}: {psnr.mean:.1f} dB [{psnr.low:.1f}, {psnr.high:.1f}]")
    if first is not None:
        for variant, d in differences(records, first[1]).items():
            print(f"{variant}: {d['mean']:+.2f} dB [{d['low']:+.2f}, {d['high']:+.2f}] against {first[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--recipes", nargs="+", default=["default"], help="default, a profile to lay over params.yaml, or KEY=VALUE,..."
    )
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=(*FORMATS, "asym_w4a8"))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--skip", type=int, default=0, help="evaluation prompts to leave out at the start")
    parser.add_argument("--json", type=Path, help="where to keep all metrics")
    arguments = parser.parse_args()
    results: dict[str, list[Record]] = {}
    with temporary_checkout() as checkout:
        for fmt in arguments.formats:
            first = None
            for recipe in arguments.recipes:
                name = f"{recipe} {fmt}"
                results[name] = measure(checkout, recipe, fmt, arguments.variants, arguments.prompts, arguments.skip)
                show(name, results[name], first)
                first = first or (name, results[name])
                if arguments.json:
                    plain = {name: [r.model_dump(mode="json") for r in rs] for name, rs in results.items()}
                    arguments.json.write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
