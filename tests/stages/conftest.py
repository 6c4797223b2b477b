"""A working folder in which single stages run in process, on a model with two blocks per expert and 32 x 32 pixels."""

import importlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner, Result

from stages import _stage
from tests.workspace import SOURCE_MODEL, TINY_MODEL, cut_model

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFEST = "data/prompts/manifest.jsonl"
HIGH = ("--expert", "high_noise")
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Three steps at shift 4: t = 1000 for the high-noise expert, about 889 and 667 for the other; no guidance.
PARAMS = {
    "compute": {"threads": 1},
    "model": {"source": TINY_MODEL},
    "sampling": {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "steps": 3,
        "flow_shift": 4.0,
        "max_sequence_length": 16,
        "guidance_scale": 1.0,
        "guidance_scale_2": 1.0,
    },
    "trajectories": {
        "manifest": MANIFEST,
        "calibration_prompts": 1,
        "validation_prompts": 1,
        "heldout_prompts": 1,
        "text_prompts": None,
    },
    "bins": {"high_noise": 1, "low_noise": 1},
    "capture": {"search_tokens": 16, "heldout_tokens": 16, "blocks_per_shard": 1},
    "lowrank": {"rank": 8},
    "smooth": {"alpha": 0.5},
    "sensitivity": {"prompts": 1},
    "generate": {"manifest": MANIFEST, "prompts": 1},
}


@dataclass(frozen=True)
class Folder:
    """Where stages run; it is the current folder."""

    root: Path

    def run(self, stage: str, *arguments: str) -> Result:
        """Run one stage as `python -m stages.STAGE` does."""
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(getattr(importlib.import_module(f"stages.{stage}"), stage))
        return CliRunner().invoke(app, arguments)

    def finish(self, stage: str, *arguments: str) -> None:
        """Run one stage that must end well."""
        result = self.run(stage, *arguments)
        if result.exit_code:
            raise AssertionError(f"{stage}: exit code {result.exit_code}: {result.output}") from result.exception

    def set(self, key: str, value: object) -> None:
        """Set one value of params.yaml; the key is dotted, and need not exist."""
        values = yaml.safe_load((self.root / "params.yaml").read_text())
        *parents, last = key.split(".")
        section = values
        for name in parents:
            section = section[name]
        section[last] = value
        (self.root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def artifacts(self) -> dict[str, bytes]:
        """Every file below artifacts/, hidden or not, and hidden folders, which would be leftovers."""
        found = [
            path for path in sorted((self.root / "artifacts").rglob("*")) if path.is_file() or path.name.startswith(".")
        ]
        return {str(path): path.read_bytes() if path.is_file() else b"" for path in found}

    def unfinished(self) -> list[Path]:
        """Half-written units."""
        return list((self.root / ".units").glob("*/.*"))


def write_prompts(root: Path) -> None:
    """One prompt per split, from the demo's calibration prompts."""
    rows = [json.loads(line) for line in (ROOT / "data/calibration/manifest.jsonl").read_text().splitlines()[:4]]
    target = root / MANIFEST
    (target.parent / "images").mkdir(parents=True)
    for row, split in zip(rows, ("calibration", "validation", "heldout", "evaluation")):
        row["split"] = split
        shutil.copyfile(ROOT / "data/calibration" / row["image"], target.parent / row["image"])
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder after model, trajectories and one expert's capture."""
    root = tmp_path_factory.mktemp("stages") / "folder"
    cut_model(ROOT / SOURCE_MODEL, root / TINY_MODEL)
    write_prompts(root)
    params = yaml.safe_load((ROOT / "lib/stepquant/profiles/demo.yaml").read_text())
    for section, values in PARAMS.items():
        params[section] |= values
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, root)
        folder = Folder(root)
        folder.finish("model")
        folder.finish("trajectories")
        folder.finish("capture", "--expert", "high_noise")
    torch.set_grad_enabled(True)
    return root


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """A copy of the finished folder that a test may change."""
    root = tmp_path / "folder"
    shutil.copytree(finished, root, copy_function=copy_or_link)
    in_process(monkeypatch, root)
    yield Folder(root)
    torch.set_grad_enabled(True)


@pytest.fixture
def refused(folder):
    """Run a stage that must refuse, and give its one message; artifacts and units must stay as they were."""

    def run(stage, *arguments):
        before = folder.artifacts()
        result = folder.run(stage, *arguments)
        assert result.exit_code == 2, (result.output, result.exception)
        assert folder.artifacts() == before
        assert folder.unfinished() == []
        # Lines of progress may stand before the message; nothing comes after it.
        progress, _, message = result.stderr.rpartition("error: ")
        assert "error: " not in progress and message.count("\n") == 1 and message.endswith("\n")
        return message.rstrip("\n")

    return run


def copy_or_link(source: str, target: str) -> None:
    """Copy the texts that tests write into; all else is linked, which is quicker, and is only ever replaced."""
    edited = source.endswith((".yaml", ".jsonl", "config.json"))
    (shutil.copyfile if edited else os.link)(source, target)


def in_process(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Stages run in the current folder, and would ask Linux to end this process, pytest, with its parent."""
    patch.chdir(root)
    patch.setattr(_stage, "die_with_parent", lambda: None)


# What the file system can refuse, by its audit event: which of the arguments is the path that would be written.
WRITES = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.remove": 0, "os.rmdir": 0, "shutil.rmtree": 0}


class Disk:
    """Makes the file system refuse writes, as a full disk or a read-only one does.

    It uses a Python audit hook, which is called for every write of Python code and needs no rights and no mounts. A
    hook cannot be removed again, so there is one, which does nothing unless told.
    """

    def __init__(self):
        self._refusals = []
        sys.addaudithook(self._hook)

    def refuse(self, number: int, pattern: str, events: tuple[str, ...] = ("open", *WRITES)) -> None:
        """From now on, `events` on matching paths fail with this errno.

        The pattern is relative to the current folder, and its * also matches /.
        """
        self._refusals.append((number, pattern, events))

    def allow(self) -> None:
        self._refusals.clear()

    def _hook(self, event: str, args: tuple) -> None:
        if not self._refusals:
            return
        if event == "open":
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in WRITES:
            path = args[WRITES[event]]
        else:
            return
        if not isinstance(path, str | os.PathLike):
            return
        place = os.path.relpath(path)
        for number, pattern, events in self._refusals:
            if event in events and fnmatch(place, pattern):
                raise OSError(number, os.strerror(number), str(path))


@pytest.fixture(scope="session")
def hook():
    return Disk()


@pytest.fixture
def disk(hook):
    yield hook
    hook.allow()
