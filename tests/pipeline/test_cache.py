"""Which stages rerun after a change: the answer of DVC in a copy of the finished workspace, and tables by hand."""

import os
from pathlib import Path

import pytest
from dvc.repo import Repo

from tests.workspace import Workspace

EXPERTS = ("high_noise", "low_noise")
# Which variants take the low-rank branch, the GPTQ residual and the clips: the table in stages/pack.py.
BRANCH = ("w4a16", "svdquant", "svdquant_gptq", "one_clip", "full", "scheduled")
ROUNDED = ("w4a16", "svdquant_gptq", "one_clip", "full", "scheduled")
CLIPPED = ("one_clip", "full", "scheduled")
SCHEDULED = ("scheduled",)
PACKED = ("rtn", *BRANCH)
SAMPLED = ("bf16", *PACKED)


def each(stages: str, names: tuple[str, ...]) -> set[str]:
    """each("pack generate", ("full",)) is {"pack@full", "generate@full"}."""
    return {f"{stage}@{name}" for stage in stages.split() for name in names}


def below(variants: tuple[str, ...]) -> set[str]:
    """What follows once the factors of these variants have changed."""
    return each("pack generate evaluate", variants) | {"report"}


def factors(stages: str, experts: tuple[str, ...] = EXPERTS) -> set[str]:
    """Stages of the factors of some experts, and what is measured on them: sensitivity and schedule."""
    return each(f"{stages} sensitivity", experts) | {"schedule"}


ALL = (
    {"model", "trajectories"}
    | factors("capture lowrank gptq clip")
    | below(PACKED)
    | each("generate evaluate", ("bf16",))
)
# Layers of every variant are scored on held-out activations: new ones score rtn again, though it is not sampled again.
NEW_ACTIVATIONS = below(BRANCH) | {"evaluate@rtn"}

# A key of every section, and of compute every kind: dvc.yaml names whole sections (tests/pipeline/test_dvc_yaml.py).
PARAMS = {
    "model.loras": ([{"expert": "high_noise", "file": "data/models/lora.safetensors", "weight": 1.0}], ALL),
    "compute.threads": (2, ALL - {"model"}),
    "compute.dtype": ("bfloat16", ALL - {"model"}),
    "compute.offload": ("disk", {"report"}),
    "compute.executor": ("ray", {"report"}),
    "compute.workers": (2, {"report"}),
    "compute.address": ("head:6379", {"report"}),
    "compute.gpus_per_unit": (0.5, {"report"}),
    "sampling.steps": (5, ALL - {"model"}),
    "trajectories.validation_prompts": (
        2,
        {"trajectories"} | factors("capture lowrank gptq clip") | NEW_ACTIVATIONS,
    ),
    "storage.url": (
        "s3://bucket/prefix",
        {"trajectories"} | factors("capture lowrank gptq clip") | NEW_ACTIVATIONS,
    ),
    "bins.high_noise": (1, factors("capture lowrank gptq clip", ("high_noise",)) | NEW_ACTIVATIONS),
    "bins.low_noise": ([900, 800, 700, 0], factors("capture lowrank gptq clip", ("low_noise",)) | NEW_ACTIVATIONS),
    "capture.calls_per_shard": (4, factors("capture lowrank gptq clip") | NEW_ACTIVATIONS),
    "target.program": ("comfyui_w4a8", {"report"}),
    "format.weight": ("int4", factors("lowrank gptq clip") | below(PACKED)),
    "smooth.gradient_steps": (0, factors("lowrank gptq clip") | below(BRANCH)),
    "center.means": (False, factors("lowrank gptq clip") | below(BRANCH)),
    "rotate.hadamard_sizes": ([0], factors("lowrank gptq clip") | below(BRANCH)),
    "rotate.hadamard": ("regular", factors("lowrank gptq clip") | below(BRANCH)),
    "lowrank.rank": (32, factors("lowrank gptq clip") | below(BRANCH)),
    "gptq.scales": ("absmax", factors("gptq clip") | below(ROUNDED)),
    "clip.ratios": ([0.9, 1.0], factors("clip") | below(CLIPPED)),
    "sensitivity.seed": (1, factors("") | below(SCHEDULED)),
    "precision.activation_budget": (0.5, {"schedule"} | below(SCHEDULED)),
    "experts.low_noise.lowrank": ({"rank": 8}, factors("lowrank gptq clip", ("low_noise",)) | below(BRANCH)),
    "experts.high_noise.smooth": ({"alpha": 0.5}, factors("lowrank gptq clip", ("high_noise",)) | below(BRANCH)),
    "experts.low_noise.rotate": ({"blocks": [32]}, factors("lowrank gptq clip", ("low_noise",)) | below(BRANCH)),
    "experts.high_noise.gptq": ({"dampings": [0.02]}, factors("gptq clip", ("high_noise",)) | below(ROUNDED)),
    "experts.low_noise.clip": ({"ratios": [1.0]}, factors("clip", ("low_noise",)) | below(CLIPPED)),
    "generate.prompts": (2, each("generate evaluate", SAMPLED) | {"report"}),
    "evaluate.seed": (1, each("evaluate", SAMPLED) | {"report"}),
    "report.title": ("Another title", {"report"}),
}

FILES = {
    "data/models/tiny/transformer/config.json": ALL,
    "data/calibration/manifest.jsonl": {"trajectories"} | factors("capture lowrank gptq clip") | NEW_ACTIVATIONS,
    "data/evaluation/manifest.jsonl": each("generate evaluate", SAMPLED) | {"report"},
    "lib/stepquant/quantize/gptq.py": factors("gptq clip") | below(ROUNDED),
    "stages/clip.py": factors("clip") | below(CLIPPED),
    "stages/schedule.py": {"schedule"} | below(SCHEDULED),
    "lib/stepquant/calibration/step_gradients.py": factors("") | below(SCHEDULED),
    "lib/stepquant/evaluate/fidelity.py": each("evaluate", SAMPLED) | {"report"},
    "lib/stepquant/report/page.html.j2": {"report"},
    "lib/stepquant/compute/executor.py": set(),
}


@pytest.fixture(scope="module")
def changeable(workspace, tmp_path_factory) -> Workspace:
    """One copy for the whole table; each test takes back what it changed."""
    return workspace.copy(tmp_path_factory.mktemp("changeable") / "workspace")


def must_run(workspace: Workspace) -> set[str]:
    """The stages that DVC would run, and all that depend on them, whatever their outputs turn out to be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", workspace.environment["DVC_SITE_CACHE_DIR"])
        patch.chdir(workspace.root)
        with Repo(os.fspath(workspace.root)) as repo:
            return {stage.name for stage in repo.reproduce(dry=True, force_downstream=True)}


def test_nothing_must_run_after_a_run(changeable):
    assert must_run(changeable) == set()


@pytest.mark.parametrize("key", PARAMS)
def test_a_changed_value_reruns_what_depends_on_it(changeable, key):
    value, expected = PARAMS[key]
    params = changeable.root / "params.yaml"
    before = params.read_text()
    try:
        changeable.set(key, value)
        assert must_run(changeable) == expected
    finally:
        params.write_text(before)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_reruns_what_depends_on_it(changeable, name):
    file: Path = changeable.root / name
    before = file.read_text()
    try:
        file.write_text(before + "\n")
        assert must_run(changeable) == FILES[name]
    finally:
        file.write_text(before)


def test_repro_after_repro_runs_nothing(workspace_copy):
    output = workspace_copy.run("dvc", "repro")
    assert "Running stage" not in output
    assert "Data and pipelines are up to date." in output


def test_an_override_of_one_expert_runs_that_expert_alone(workspace_copy):
    before = workspace_copy.hashes()
    workspace_copy.set("experts.low_noise.gptq", {"dampings": [0.5]})
    assert running(workspace_copy.run("dvc", "repro", "gptq", "clip")) == ["gptq@low_noise", "clip@low_noise"]
    after = workspace_copy.hashes()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"gptq@low_noise: artifacts/residual/low_noise", "clip@low_noise: artifacts/clip/low_noise"}
    workspace_copy.set("experts.low_noise.gptq", {})
    assert running(workspace_copy.run("dvc", "repro", "gptq", "clip")) == []
    assert workspace_copy.hashes() == before


def running(output: str) -> list[str]:
    """The stages that `dvc repro` says it ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]
