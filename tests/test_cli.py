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
    assert result.stderr == "error: no profile 'wan'; allowed: demo, paper, wan2.2-i2v-a14b\n"
    assert list(folder.iterdir()) == []


def test_a_recipe_needs_a_model_to_lie_on(folder):
    result = invoke("profile", "paper")
    assert result.exit_code == 2 and "write a profile with a model first, such as demo" in result.stderr
    assert list(folder.iterdir()) == []


def test_show_without_metrics_says_what_is_missing(folder):
    result = invoke("show")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: artifacts/metrics")
