"""Loading a checkpoint needs the dependencies of the wheel only; the `stepquant` command needs the extra `pipeline`."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import stepquant
from stepquant.checkpoint.writer import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"scikit-image": "skimage", "scikit-learn": "sklearn", "ruamel.yaml": "ruamel"}
# In the extra as well, because stepquant itself imports them there; diffusers and transformers require them anyway.
OF_DIFFUSERS = {"numpy", "pillow", "pyyaml"}

# Runs first in a subprocess: the packages in sys.argv[1] look as if they were not installed.
HIDE = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

HIDDEN = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
"""

LOAD = """
import torch, stepquant
pipe = stepquant.load_pipeline(sys.argv[1], dtype=torch.float32, text_encoder=None, tokenizer=None)
x = torch.zeros(1, 36, 2, 4, 4)
y = pipe.transformer(x, timestep=torch.tensor([950]), encoder_hidden_states=torch.ones(1, 3, 128)).sample
assert y.isfinite().all() and not HIDDEN & {name.split(".")[0] for name in sys.modules}, HIDDEN & set(sys.modules)
print(type(pipe).__name__)
"""

COMMAND = """
import runpy
runpy.run_module("stepquant", run_name="__main__")
"""


OURS_IS_MISSING = """
import stepquant.__main__

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "stepquant.cli":
            raise ModuleNotFoundError("No module named 'stepquant.gone'", name="stepquant.gone")

sys.meta_path.insert(0, Gone())
stepquant.__main__.main()
"""


def names(requirements):
    """Distributions of a list of requirements, extras of this package followed."""
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        if name == "stepquant":
            for extra in re.search(r"\[(.*)\]", requirement)[1].split(","):
                yield from names(PROJECT["optional-dependencies"][extra])
        else:
            yield name


def hidden(*extras):
    requirements = [requirement for extra in extras for requirement in PROJECT["optional-dependencies"][extra]]
    return ",".join(sorted({MODULES.get(name, name) for name in set(names(requirements)) - OF_DIFFUSERS}))


def run(script, *arguments):
    return subprocess.run([sys.executable, "-c", HIDE + script, *arguments], capture_output=True, text=True)


def test_dependencies_are_few_and_have_lower_bounds_only():
    """ftfy beside the five: the Wan pipelines of diffusers call it for every prompt, without requiring it."""
    required = ["torch", "diffusers", "transformers", "accelerate", "safetensors", "ftfy"]
    assert list(names(PROJECT["dependencies"])) == required
    assert all(re.fullmatch(r"\w+>=[\d.]+", requirement) for requirement in PROJECT["dependencies"])


def test_a_checkpoint_loads_and_runs_without_the_extras(source, tools, tmp_path):
    settings = {name: tools.settings(name, "int4", "int4", rank=8) for name in tools.edges}
    blocks = {name: (s, tools.blocks(source / name, s)) for name, s in settings.items()}
    write_checkpoint(source, tmp_path / "out", blocks, dtype=torch.float32, flow_shift=5.0)
    packages = hidden("pipeline", "ray", "s3", "training")
    assert {"pydantic", "typer", "rich", "zarr", "av", "dvc", "skimage", "matplotlib"} <= set(packages.split(","))
    result = run(LOAD, packages, str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "WanImageToVideoPipeline\n"


@pytest.mark.parametrize("package", ["typer", "pydantic"])
def test_the_command_without_the_extra(package):
    result = run(COMMAND, package, "check")
    message = f"error: the stepquant command needs the package {package}; run: pip install 'stepquant[pipeline]'\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


def test_the_command_with_the_extra():
    result = run(COMMAND, "no_such_package", "--help")
    assert result.returncode == 0 and "quantization of video" in result.stdout


def test_a_module_of_our_own_that_is_missing_is_no_missing_package():
    result = run(OURS_IS_MISSING, "none")
    assert result.returncode == 1 and "ModuleNotFoundError: No module named 'stepquant.gone'" in result.stderr


def test_version():
    assert stepquant.__version__ == version("stepquant")
