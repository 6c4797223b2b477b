"""Runs the whole pipeline again in a copy of this checkout and compares the results. `make reproduce` calls it.

Two claims are checked after a finished `dvc repro`:

1. Same machine, same bytes: run again without finished units, run-cache or artifacts, every stage gives the hashes in
   dvc.lock of this checkout.
2. Other machine, same numbers: metrics.json agrees with the committed reference within its tolerances.

Exit code 0 if both hold, 1 if one does not, 2 if this checkout has not been run yet. `--accept` makes this checkout's
metrics.json the new reference.
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
# The inputs of the pipeline; it makes everything else.
SOURCES = ("dvc.yaml", "params.yaml", "stages", "lib", "data/models", "data/calibration", "data/evaluation")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--accept", action="store_true", help="make this checkout's metrics.json the reference, and stop"
    )
    if parser.parse_args().accept:
        accept(ROOT)
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
    """The values of metrics.json that are outside the tolerances of the reference."""
    reference = json.loads((root / REFERENCE).read_text())
    metrics = json.loads((root / "metrics.json").read_text())
    return list(metric_differences(reference["metrics"], metrics, reference["tolerance"]))


def metric_differences(expected: Any, found: Any, tolerance: dict[str, Any], key: str = "") -> Iterator[str]:
    """Compare nested numbers.

    Args:
        expected: Numbers of the reference, in nested dicts.
        found: Numbers of this checkout.
        tolerance: key -> {"absolute": x} or {"relative": x}, such as {"psnr": {"absolute": 0.5}}. It applies to
            everything below the key.
        key: Where these numbers are, for the messages.

    Yields:
        A line per difference.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            below = tolerance.get(name, tolerance)
            yield from metric_differences(expected.get(name), found.get(name), below, f"{key}.{name}".lstrip("."))
    elif not _agree(expected, found, tolerance):
        yield f"metrics.json {key}: {found}, the reference has {expected} (tolerance {tolerance})"


def _agree(expected: float | None, found: float | None, tolerance: dict[str, float]) -> bool:
    if expected is None or found is None:
        return expected is found
    allowed = tolerance.get("absolute", 0.0) + tolerance.get("relative", 0.0) * abs(expected)
    return abs(found - expected) <= allowed


def accept(root: Path) -> None:
    """Make the metrics of a checkout the reference; reasons and tolerances stay."""
    reference = json.loads((root / REFERENCE).read_text())
    reference["metrics"] = json.loads((root / "metrics.json").read_text())
    (root / REFERENCE).write_text(json.dumps(reference, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
