import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from stepquant import cli, profiles

ROOT = Path(__file__).resolve().parent.parent


def invoke(*arguments):
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage_names():
    """Every file of stages/ that is a program."""
    return {file.stem for file in (ROOT / "stages").glob("*.py") if "__main__" in file.read_text()}


def test_the_command_knows_every_stage():
    assert set(cli.STAGES) == stage_names()


def test_stages_are_offered_inside_the_repository_only(tmp_path):
    program = [sys.executable, "-c", "from stepquant.cli import app; app()", "--help"]
    inside = subprocess.run(program, cwd=ROOT, capture_output=True, text=True).stdout
    outside = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True).stdout
    listed = {line.split()[1] for line in inside.splitlines() if len(line.split()) > 2}
    assert stage_names() <= listed and {"check", "profile", "show"} <= listed
    assert "check" in outside and "Stages" not in outside


def test_a_stage_is_the_same_function_by_either_name():
    """The params file is missing, which both must say; importing torch is what takes the time."""
    ours = [sys.executable, "-c", "from stepquant.cli import app; app()", "model", "--params", "absent.yaml"]
    plain = [sys.executable, "-m", "stages.model", "--params", "absent.yaml"]
    first, second = (subprocess.run(args, cwd=ROOT, capture_output=True, text=True) for args in (ours, plain))
    assert first.returncode == second.returncode == 2
    assert first.stderr == second.stderr == "error: absent.yaml: no such file; `stepquant profile demo` writes one\n"


@pytest.mark.parametrize("name", cli.STAGES)
def test_the_help_of_a_stage_names_its_params_sections_and_its_out(name):
    tree = ast.parse((ROOT / "stages" / f"{name}.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    text = " ".join(ast.get_docstring(function).split())
    reads = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "READS")
    sections = [constant.value for constant in ast.walk(reads) if isinstance(constant, ast.Constant)]
    for section in sections:
        assert section in text.split("Reads", 1)[1]
    assert "all params" in text or sections
    assert "Writes artifacts/" in text


def test_check_says_that_a_file_is_fine(folder):
    (folder / "params.yaml").write_text(profiles.read_profiles()["demo"])
    assert invoke("check").stdout == "params.yaml: fine\n"


def test_check_refuses_with_exit_code_2(folder):
    (folder / "mine.yaml").write_text(profiles.read_profiles()["demo"].replace("rank: 32", "rnk: 32", 1))
    result = invoke("check", "--params", "mine.yaml")
    assert result.exit_code == 2
    assert result.stderr == "error: mine.yaml: lowrank.rnk: unknown parameter; allowed: rank, seed\n"


@pytest.mark.parametrize("name", sorted(profiles.read_profiles()))
def test_every_profile_gives_params_that_pass(folder, name):
    assert invoke("profile", "demo").exit_code == 0
    assert invoke("profile", name).stdout == f"params.yaml: now the profile {name}\n"
    assert invoke("check").exit_code == 0


def test_the_repository_ships_with_the_demo_profile():
    """Only values count: params.yaml may be edited for comments, and paths in it are those of the repository."""
    shipped, demo = (
        yaml.safe_load(text) for text in ((ROOT / "params.yaml").read_text(), profiles.read_profiles()["demo"])
    )
    assert shipped == demo


def test_a_profile_keeps_changes_of_your_own_unless_forced(folder):
    invoke("profile", "demo")
    changed = (folder / "params.yaml").read_text().replace("rank: 32", "rank: 48")
    (folder / "params.yaml").write_text(changed)
    result = invoke("profile", "wan2.2-i2v-a14b")
    assert result.exit_code == 2 and "--force" in result.stderr
    assert (folder / "params.yaml").read_text() == changed
    assert invoke("profile", "wan2.2-i2v-a14b", "--force").exit_code == 0
    assert (folder / "params.yaml").read_text() == profiles.read_profiles()["wan2.2-i2v-a14b"]


def test_an_unknown_profile_lists_those_there_are(folder):
    result = invoke("profile", "wan")
    assert result.exit_code == 2
    allowed = "comfyui_w4a8, demo, paper, wan2.1-flf2v-14b-720p, "
    assert result.stderr.startswith(f"error: no profile 'wan'; allowed: {allowed}")
    assert list(folder.iterdir()) == []


def test_without_a_name_profiles_are_listed(folder):
    result = invoke("profile")
    assert result.exit_code == 0 and list(folder.iterdir()) == []
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert [name for name, _ in lines] == sorted(profiles.read_profiles())
    assert dict(lines)["wan2.2-t2v-a14b"] == "Wan2.2-T2V-A14B at 480P: 81 frames, 40 steps, text to video."


def test_a_profile_on_a_base_is_a_whole_file_with_comments(folder):
    """What it does not name is as in its base; its own sections replace those of the base with their comments."""
    invoke("profile", "wan2.1-t2v-1.3b")
    text, base = (folder / "params.yaml").read_text(), profiles.read_profiles()["wan2.2-i2v-a14b"]
    assert text.startswith("# Wan2.1-T2V-1.3B at 480P: 81 frames, 50 steps, text to video.\n")
    assert "base:" not in text and "recommends shift 8 to 12" in text and "wan_i2v_A14B.py" not in text
    found, own = yaml.safe_load(text), yaml.safe_load(base)
    assert list(found) == list(own)
    assert {name for name in own if found[name] != own[name]} == {"model", "sampling", "bins", "report", "experts"}


def test_a_recipe_leaves_bins_of_other_experts(folder):
    """The paper has bins of two experts."""
    invoke("profile", "wan2.1-t2v-1.3b")
    before = yaml.safe_load((folder / "params.yaml").read_text())
    assert invoke("profile", "paper").exit_code == 0
    after = yaml.safe_load((folder / "params.yaml").read_text())
    assert after["bins"] == before["bins"] and after["lowrank"]["rank"] == 16


@pytest.mark.parametrize("name", sorted(set(profiles.read_profiles()) - {"demo", "paper", "comfyui_w4a8"}))
def test_profiles_of_published_models(folder, name):
    """Prompts of the user's own, where DVC watches; sizes that the model takes; bins that are reached."""
    assert invoke("profile", name).exit_code == 0
    values = yaml.safe_load((folder / "params.yaml").read_text())
    assert values["trajectories"]["manifest"] == "data/calibration/my_prompts.jsonl"
    assert values["generate"]["manifest"] == "data/evaluation/my_prompts.jsonl"
    assert not (ROOT / values["generate"]["manifest"]).exists()
    planned = invoke("plan", "--machine", "h100")
    assert planned.exit_code == 0, planned.output
    assert "no sampling step" not in planned.stdout and "dvc repro" in planned.stdout


def test_a_recipe_needs_a_model_to_lie_on(folder):
    result = invoke("profile", "paper")
    assert result.exit_code == 2 and "write a profile with a model first, such as demo" in result.stderr
    assert list(folder.iterdir()) == []


def test_show_without_metrics_says_what_is_missing(folder):
    result = invoke("show")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: artifacts/metrics")
