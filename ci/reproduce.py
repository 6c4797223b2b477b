"""Runs the whole pipeline again in a copy of this checkout and compares the results. `make reproduce` calls it.

Two claims are checked after a finished `dvc repro`:

1. Same machine, same bytes: run again without finished units, run-cache or artifacts, every stage gives the hashes in
   dvc.lock of this checkout.
2. Other machine, same numbers: metrics.json agrees with the reference runs in data/reference/metrics.json, which are of
   the same code on several processors or with several sets of CPU kernels. The noise of a measure (psnr, layer_error)
   is the largest spread of one of its numbers over these runs. A number agrees if it is outside of the range of the
   runs by no more than NOISES times the noise of its measure.

Exit code 0 if both hold, 1 if one does not, 2 if this checkout has not been run yet. `--accept NAME` makes this
checkout's metrics.json a reference run of that name. Remove the runs of earlier code from the file by hand.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path("data/reference/metrics.json")
# How far outside of the reference runs a number may be, in units of the largest spread of its measure over these runs.
NOISES = 2.0
# Measures whose spread is relative to the number, because errors of layers differ by a factor of ten between variants.
RELATIVE = ("layer_error",)
# The inputs of the pipeline; it makes everything else.
SOURCES = ("dvc.yaml", "params.yaml", "stages", "lib", "data/models", "data/calibration", "data/evaluation")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--accept", metavar="NAME", help="make metrics.json the reference run of this name, and stop")
    name = parser.parse_args().accept
    if name is not None:
        accept(ROOT, name)
        return 0
    environment = pipeline_environment(ROOT)
    if not (ROOT / "dvc.lock").is_file() or run_dvc(ROOT, environment, "status", "--quiet", "dvc.yaml").returncode:
        print("reproduce: this checkout is not up to date; run `dvc repro` first", file=sys.stderr)
        return 2
    differences = [*rerun_differences(ROOT, environment), *reference_differences(ROOT)]
    for line in differences:
        print(f"reproduce: {line}", file=sys.stderr)
    if not differences:
        print("reproduce: identical hashes, and metrics as in the reference")
    return 1 if differences else 0


def rerun_differences(root: Path, environment: dict[str, str]) -> list[str]:
    """Run every stage in a copy, and name the outs whose hashes differ."""
    first = lock_hashes(root / "dvc.lock")
    with tempfile.TemporaryDirectory(prefix="stepquant-reproduce-") as folder:
        copy = Path(folder) / "checkout"
        copy_sources(root, copy)
        if run_dvc(copy, pipeline_environment(copy) | {"DVC_SITE_CACHE_DIR": f"{folder}/site"}, "repro").returncode:
            return ["dvc repro failed in a copy of the checkout; its output says where"]
        second = lock_hashes(copy / "dvc.lock")
    return list(hash_differences(first, second))


def copy_sources(root: Path, copy: Path, names: tuple[str, ...] = SOURCES) -> None:
    """A runnable copy of a checkout: inputs of the pipeline and settings of DVC; no artifact, unit, cache or lock."""
    copy.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*names, ".dvcignore"):
        if (root / name).is_dir():
            shutil.copytree(root / name, copy / name, ignore=ignore)
        else:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, copy / name)
    (copy / ".dvc").mkdir()
    shutil.copyfile(root / ".dvc" / "config", copy / ".dvc" / "config")
    # The copy is no git repository, which DVC requires unless it is told otherwise.
    (copy / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")


def pipeline_environment(root: Path) -> dict[str, str]:
    """An environment in which `python` is this interpreter and `stepquant` is that of the checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return os.environ | {"PATH": path, "PYTHONPATH": str(root / "lib"), "DVC_NO_ANALYTICS": "1"}


def run_dvc(root: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment, check=False)


def lock_hashes(lock: Path) -> dict[str, str]:
    """The hash of every out, as DVC recorded it; keys are "stage: path"."""
    stages = yaml.safe_load(lock.read_text())["stages"]
    return {f"{name}: {out['path']}": out["md5"] for name, stage in stages.items() for out in stage.get("outs", ())}


def hash_differences(first: dict[str, str], second: dict[str, str]) -> Iterator[str]:
    for name in sorted(first | second):
        if first.get(name) != second.get(name):
            yield f"{name}: {first.get(name)} in this checkout, {second.get(name)} when run again"


def reference_differences(root: Path) -> list[str]:
    """The numbers of metrics.json that are too far from those of the reference runs."""
    reference = json.loads((root / REFERENCE).read_text())
    return metric_differences(list(reference["runs"].values()), json.loads((root / "metrics.json").read_text()))


def metric_differences(runs: list[dict[str, Any]], metrics: dict[str, Any]) -> list[str]:
    """Compare nested numbers with those of reference runs.

    Args:
        runs: Variant -> measure -> number, null, or numbers by expert, of each reference run; at least one.
        metrics: The same of this checkout.

    Returns:
        A line per difference: a number too far from all runs, or a key that is not in all of them.
    """
    expected = [numbers(run) for run in runs]
    found = numbers(metrics)
    noise = spreads(expected)
    lines = []
    for key in sorted({key for run in (*expected, found) for key in run}):
        values, measure = [run.get(key, "absent") for run in (*expected, found)], key.split(".")[1]
        if not all(isinstance(value, float) for value in values):
            if len(set(values)) > 1:
                lines.append(f"metrics.json {key}: {values[-1]}, the reference runs have {values[:-1]}")
            continue
        low, high, value = min(values[:-1]), max(values[:-1]), values[-1]
        allowed = NOISES * noise[measure] * (abs(low) if measure in RELATIVE else 1.0)
        if not low - allowed <= value <= high + allowed:
            lines.append(f"metrics.json {key}: {value}, the reference runs have {low} to {high} (+- {allowed:.2g})")
    return lines


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> number as float, or None, of nested dicts. An empty dict has no key."""
    flat: dict[str, Any] = {}
    for variant, measures in metrics.items():
        for measure, value in measures.items():
            by_expert = value if isinstance(value, dict) else {"": value}
            for expert, number in by_expert.items():
                key = f"{variant}.{measure}.{expert}".rstrip(".")
                flat[key] = number if number is None else float(number)
    return flat


def spreads(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The largest difference between two runs, per measure; relative for the measures in RELATIVE."""
    largest: dict[str, float] = {}
    for key in runs[0]:
        values, measure = [run.get(key) for run in runs], key.split(".")[1]
        present = [value for value in values if value is not None]
        if present:
            spread = (max(present) - min(present)) / (abs(min(present)) if measure in RELATIVE else 1.0)
            largest[measure] = max(largest.get(measure, 0.0), spread)
    return largest


def accept(root: Path, name: str) -> None:
    """Make the metrics of a checkout a reference run; the text and the other runs stay."""
    reference = json.loads((root / REFERENCE).read_text())
    reference["runs"][name] = json.loads((root / "metrics.json").read_text())
    (root / REFERENCE).write_text(json.dumps(reference, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
