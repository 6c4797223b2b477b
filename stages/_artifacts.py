"""The paths of all artifacts, as in dvc.yaml."""

from pathlib import Path

ROOT = Path("artifacts")
MODEL = ROOT / "model" / "manifest.json"
TRAJECTORIES = ROOT / "trajectories.zarr"
SCHEDULE = ROOT / "schedule.json"
REPORT = ROOT / "report"
METRICS = ROOT / "metrics"
HEADLINES = Path("metrics.json")


def activations(expert: str) -> Path:
    return ROOT / "activations" / f"{expert}.zarr"


def lowrank(expert: str) -> Path:
    return ROOT / "lowrank" / expert


def residual(expert: str) -> Path:
    return ROOT / "residual" / expert


def clip(expert: str) -> Path:
    return ROOT / "clip" / expert


def sensitivity(expert: str) -> Path:
    return ROOT / "sensitivity" / expert


def checkpoint(variant: str) -> Path:
    return ROOT / "checkpoints" / variant


def videos(variant: str) -> Path:
    return ROOT / "videos" / variant


def video(variant: str, prompt: str) -> Path:
    return videos(variant) / prompt / "video.mp4"


def metrics(variant: str) -> Path:
    return METRICS / f"{variant}.json"
