"""dvc.yaml is right: a stage reads the parameters, the code and the artifacts that it declares, and no others."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from dvc.stage import Stage

from stepquant.params import OVERRIDABLE, SECTIONS
from stepquant.storage.code_version import source_files
from tests.once import once
from tests.workspace import ROOT, Workspace

with Repo(os.fspath(ROOT)) as repo:
    STAGES: dict[str, Stage] = {stage.name: stage for stage in repo.index.stages if stage.path_in_repo == "dvc.yaml"}
CODE = ("lib/", "stages/")
EXPERT_STAGES = ("capture", "lowrank", "gptq", "clip", "sensitivity")


def declared_files(stage: Stage) -> list[str]:
    """The files and folders that a stage depends on, relative to the repository."""
    return [dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)]


def declared_params(stage: Stage) -> list[str] | None:
    """The dotted params keys that a stage depends on; None: all of params.yaml."""
    (params,) = [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]
    return params.params or None


def module_and_expert(stage: str) -> tuple[str, str | None]:
    name, _, instance = stage.partition("@")
    return name, instance if name in EXPERT_STAGES else None


def keys_read(section: str, expert: str | None) -> list[str]:
    """What a stage depends on that reads a section: all of it, but for plumbing and for other experts' bins."""
    model = SECTIONS[section]
    if section == "bins":
        return [f"bins.{expert}"]
    return (
        [f"{section}.{key}" for key in model.model_fields if key not in model.plumbing] if model.plumbing else [section]
    )


@pytest.mark.parametrize("name", STAGES)
def test_declared_params_are_those_the_stage_reads(name):
    module, expert = module_and_expert(name)
    reads = importlib.import_module(f"stages.{module}").READS
    expected = [key for section in reads for key in keys_read(section, expert)]
    expected += [f"experts.{expert}.{section}" for section in reads if expert and section in OVERRIDABLE]
    declared = declared_params(STAGES[name])
    if module == "report":  # shows all of params.yaml
        assert declared is None
    else:
        assert sorted(declared) == sorted(expected)


@pytest.mark.parametrize("name", STAGES)
def test_declared_code_is_what_the_stage_runs(name):
    module, _ = module_and_expert(name)
    files = source_files(
        ROOT / "stages" / f"{module}.py", {"stepquant": ROOT / "lib/stepquant", "stages": ROOT / "stages"}
    )
    expected = [file.relative_to(ROOT).as_posix() for file in files]
    expected += ["lib/stepquant/report/page.html.j2"] * (module == "report")
    assert sorted(path for path in declared_files(STAGES[name]) if path.startswith(CODE)) == sorted(expected)


@pytest.fixture(scope="module")
def alone(workspace, tmp_path_factory) -> Path:
    """Every stage run once more, each in its own folder with only its declared deps and params; the results.

    All stages share one process (tests/pipeline/alone.py), which spares 37 imports of torch.
    """
    return once(tmp_path_factory, "alone", lambda root: run_alone(workspace, root))


def run_alone(workspace: Workspace, root: Path) -> None:
    calls = {}
    for name, stage in STAGES.items():
        folder = root / name
        lay_out(workspace, stage, folder)
        calls[name] = {"folder": os.fspath(folder), "command": stage.cmd.split()[3:]}
    (root / "calls.json").write_text(json.dumps(calls))
    script = [sys.executable, os.fspath(ROOT / "tests/pipeline/alone.py"), os.fspath(root / "calls.json")]
    path = os.pathsep.join([os.fspath(workspace.root / "lib"), os.fspath(workspace.root)])
    subprocess.run(script, env=workspace.environment | {"PYTHONPATH": path}, check=True)


def lay_out(workspace: Workspace, stage: Stage, folder: Path) -> None:
    """Fill a folder with a stage's declared deps and params; hardlinks, as no stage may change what it reads."""
    inputs = {path for path in declared_files(stage) if not path.startswith(CODE)}
    if "artifacts/model" in inputs:
        inputs.add("data/models")  # whose every file the model manifest holds the SHA-256 of
    for path in sorted(inputs):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-al", workspace.root / path, folder / path], check=True)
    (folder / "params.yaml").write_text(
        yaml.safe_dump(restricted(workspace.params(), declared_params(stage)), sort_keys=False)
    )


# No stage depends on these, so that whatever they say changes nothing: here something else than where `workspace` ran.
ELSEWHERE = {"offload": "none", "executor": "local", "workers": 1, "address": "elsewhere:6379", "gpus_per_unit": 0.5}


def restricted(params: dict, keys: list[str] | None) -> dict:
    """The params with nothing but the named dotted keys, and other plumbing."""
    if keys is None:
        return params
    kept: dict = {}
    for key in keys:
        *parents, last = key.split(".")
        source, target = params, kept
        for name in parents:
            source, target = source[name], target.setdefault(name, {})
        target[last] = source[last]
    return kept | ({"compute": kept["compute"] | ELSEWHERE} if "compute" in kept else {})


@pytest.mark.parametrize("name", STAGES)
def test_declared_deps_are_enough_and_decide_every_byte(alone, workspace, name):
    result = json.loads((alone / name / "result.json").read_text())
    assert result == "done"
    for out in STAGES[name].outs:
        assert tree(alone / name / out.def_path) == tree(workspace.root / out.def_path)


def tree(path: Path) -> dict[str, str]:
    """SHA-256 of each file below a path (or of the file that it is), by relative path."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    assert files
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
