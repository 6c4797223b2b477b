"""A small copy of the repository in which the whole pipeline takes a minute or two: two blocks per expert, 32 x 32
pixels."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from ci.reproduce import copy_sources, lock_hashes, pipeline_environment

ROOT = Path(__file__).resolve().parent.parent
SOURCE_MODEL = "data/models/wan22-mini"
TINY_MODEL = "data/models/tiny"
BLOCKS = 2
CAPTIONS = 4
LONGEST = 900  # seconds until a command that hangs fails its test, rather than the whole CI run
# What is smaller than in the demo profile. Four steps put one recorded t into each bin: 1000 | 937, then 833 | 625.
TINY = {
    "compute": {"threads": 1},
    "model": {"source": TINY_MODEL},
    "sampling": {"height": 32, "width": 32, "num_frames": 5, "steps": 4, "flow_shift": 5.0, "max_sequence_length": 16},
    "trajectories": {"calibration_prompts": 2, "validation_prompts": 1, "heldout_prompts": 1},
    "bins": {"high_noise": [1000, 950, 900], "low_noise": [900, 700, 0]},
    "capture": {
        "search_tokens": 32,
        "heldout_tokens": 32,
        "calls_per_chunk": 4,
        "calls_per_shard": 8,
        "blocks_per_shard": 1,
    },
    "format": {"weight": "nvfp4", "activation": "int4"},  # int4 activations like to be clipped: every variant differs
    "smooth": {"candidates": [0.4, 0.6], "gradient_steps": 10},
    "gptq": {"refits": 2, "dampings": [0.005, 0.1]},
    "lowrank": {"rank": 16},
    "clip": {"ratios": [0.7, 0.85, 1.0]},
    "sensitivity": {"prompts": 1, "steps_per_bin": 1, "probes": 1},
    "precision": {"activation_budget": 0.3},
    "generate": {"prompts": 1},
    "evaluate": {"bootstrap_samples": 50},
}


@dataclass(frozen=True)
class Workspace:
    """A folder with the pipeline in it; commands run there, with the code that lies there."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        # DVC uses /bin/sh if SHELL is not set, as in most CI; it is often the shell that follows POSIX most strictly.
        own = {"SHELL": "/bin/sh", "DVC_SITE_CACHE_DIR": str(self.root.parent / f".{self.root.name}-site")}
        return (
            pipeline_environment(self.root)
            | own
            | {"PYTHONPATH": os.pathsep.join([str(self.root / "lib"), *ray_folder()])}
        )

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Start `python -m COMMAND...` here, in a changed environment; both output streams come as one text."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        changed = self.environment | environment
        return subprocess.Popen([sys.executable, "-m", *command], cwd=self.root, env=changed, **pipes)

    def run(self, *command: str, code: int = 0, **environment: str) -> str:
        """Run `python -m COMMAND...` here to its end, and give its output."""
        process = self.start(*command, **environment)
        output = process.communicate(timeout=LONGEST)[0]
        assert process.returncode == code, f"exit code {process.returncode}\n{output}"
        return output

    def hashes(self) -> dict[str, str]:
        return lock_hashes(self.root / "dvc.lock")

    def params(self) -> dict[str, Any]:
        return yaml.safe_load((self.root / "params.yaml").read_text())

    def set(self, key: str, value: Any) -> None:
        """Change one value of params.yaml; the key is dotted."""
        params = self.params()
        *parents, last = key.split(".")
        section = params
        for name in parents:
            section = section[name]
        assert section.get(last) != value, f"{key} is {value} already"
        section[last] = value
        (self.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def copy(self, root: Path) -> "Workspace":
        """A copy with everything in it. `cp -a` keeps the hardlinks between outs, units and cache as they are."""
        subprocess.run(["cp", "-a", self.root, root], check=True)
        return Workspace(root)


def ray_folder() -> list[str]:
    """Where Ray is installed, if it is: apart from what the pipeline has (tests/conftest.py)."""
    spec = importlib.util.find_spec("ray")
    return [str(Path(spec.origin).parent.parent)] if spec else []


def make_workspace(root: Path) -> Workspace:
    """What the pipeline reads, with the tiny model and its params; nothing has run yet."""
    copy_sources(ROOT, root, ("dvc.yaml", "stages", "lib", "data/calibration", "data/evaluation"))
    cut_model(ROOT / SOURCE_MODEL, root / TINY_MODEL)
    params = yaml.safe_load((ROOT / "lib/stepquant/profiles/demo.yaml").read_text())
    for section, values in TINY.items():
        params[section] |= values
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    captions = root / "data/calibration/captions.txt"
    captions.write_text("".join(captions.read_text().splitlines(keepends=True)[:CAPTIONS]))
    return Workspace(root)


def cut_model(source: Path, target: Path) -> None:
    """Copy a pipeline, with the first BLOCKS blocks of each expert."""
    shutil.copytree(source, target)
    for expert in ("transformer", "transformer_2"):
        config, weights = target / expert / "config.json", target / expert / "diffusion_pytorch_model.safetensors"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": BLOCKS}))
        kept = {
            key: tensor
            for key, tensor in load_file(weights).items()
            if not key.startswith("blocks.") or int(key.split(".")[1]) < BLOCKS
        }
        weights.unlink()
        save_file(kept, weights)
