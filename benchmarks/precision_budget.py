"""What a budget of 8-bit activations does to the videos, in every format.

    python benchmarks/precision_budget.py --prompts 30
    python benchmarks/precision_budget.py --formats int4 --budgets 0.05 0.1 0.2 0.4 1 --prompts 30

Runs the pipeline in a copy of this checkout, once per format, and packs and samples the variant `scheduled` once per
budget. Prints the mean squared error of the videos against BF16 as a multiple of that of `full` (4-bit activations
alone), over the same prompts and noise, with its bootstrap interval, and what stage schedule predicted.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.checkout import Checkout, temporary_checkout
from stepquant.evaluate.metrics_file import read_records
from stepquant.recipe.schedule_file import read_schedule

FORMATS = ("int4", "mxfp4", "nvfp4")
SAMPLES, CONFIDENCE = 2000, 0.95


def squared_errors(checkout: Checkout, variant: str) -> dict[str, float]:
    """Mean squared error of each video of a variant, of values 0 to 255. The PSNR is that of the pooled error."""
    (record,) = [record for record in read_records(checkout.root / "artifacts/metrics") if record.variant == variant]
    return {name: 255**2 / 10 ** (video.psnr / 10) for name, video in record.videos.per_video.items()}


def ratio_of_means(errors: Mapping[str, float], reference: Mapping[str, float]) -> tuple[float, float, float]:
    """Mean error as a multiple of the reference's mean, and its percentile bootstrap interval over videos."""
    names = sorted(reference)
    pairs = np.array([[errors[name], reference[name]] for name in names])
    draws = np.random.default_rng(0).integers(len(names), size=(SAMPLES, len(names)))
    sums = pairs[draws].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [tail, 1 - tail])
    return float(pairs[:, 0].sum() / pairs[:, 1].sum()), float(low), float(high)


def measure(checkout: Checkout, fmt: str, budgets: list[float], prompts: int) -> None:
    """Print a row per budget in one format."""
    checkout.start_from("default")
    checkout.set("format.weight", fmt)
    checkout.set("format.activation", fmt)
    checkout.set("generate.prompts", prompts)
    checkout.repro("evaluate@bf16", "evaluate@full")
    reference = squared_errors(checkout, "full")
    psnr = np.mean([10 * np.log10(255**2 / error) for error in reference.values()])
    print(f"| {fmt} | 0 | {psnr:.2f} | {np.mean(list(reference.values())):.2f} | 1 | 1 |", flush=True)
    for budget in budgets:
        checkout.set("precision.activation_budget", budget)
        checkout.repro("evaluate@scheduled")
        errors = squared_errors(checkout, "scheduled")
        psnr = np.mean([10 * np.log10(255**2 / error) for error in errors.values()])
        ratio, low, high = ratio_of_means(errors, reference)
        schedule = read_schedule(checkout.root / "artifacts/schedule.json")
        predicted = schedule.predicted_error(eight_bit=True) / schedule.predicted_error(eight_bit=False)
        mean = np.mean(list(errors.values()))
        print(
            f"| {fmt} | {budget:g} | {psnr:.2f} | {mean:.2f} | {ratio:.2f} [{low:.2f}, {high:.2f}] | {predicted:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--prompts", type=int, default=30)
    arguments = parser.parse_args()
    print("| format | budget | PSNR, dB | mean MSE | MSE by that of full | predicted |\n|---|---|---|---|---|---|")
    with temporary_checkout() as checkout:
        for fmt in arguments.formats:
            measure(checkout, fmt, arguments.budgets, arguments.prompts)


if __name__ == "__main__":
    main()
