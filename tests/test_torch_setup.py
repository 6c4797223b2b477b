"""What decides the numbers of a process is asked for, and what cannot be asked for is in the keys."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.local_compute import local_compute
from stepquant import torch_setup
from stepquant.errors import UserError
from stepquant.storage.code_version import code_digest, source_files
from stepquant.torch_setup import ARITHMETIC, SAMPLING, check_device_name, numerics_versions, prepare_torch

ROOT = Path(__file__).resolve().parent.parent
CODE = {"stepquant": ROOT / "lib/stepquant", "stages": ROOT / "stages"}
# model describes files, and report prints numbers that others made.
COMPUTING = ("trajectories", "capture", "lowrank", "gptq", "clip", "pack", "generate", "evaluate")

REPORT = """
import os, torch
{before}
from stepquant.params import Compute
from stepquant.torch_setup import prepare_torch

where = {{"offload": "none", "executor": "local", "workers": 1, "address": None, "gpus_per_unit": 0}}
prepare_torch(Compute(device="cpu", dtype="float32", threads=1, **where))
torch.nn.Linear(4, 4)(torch.zeros(1, 4))
b = torch.backends
print(
    torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
    torch.utils.deterministic.fill_uninitialized_memory, b.cudnn.benchmark, torch.is_grad_enabled(),
    torch.get_num_threads(), b.fp32_precision, b.cuda.matmul.fp32_precision, b.cudnn.fp32_precision,
    b.cudnn.conv.fp32_precision, b.cudnn.rnn.fp32_precision, os.environ["CUBLAS_WORKSPACE_CONFIG"],
    torch.cuda.is_initialized(),
)
"""


@pytest.mark.parametrize(
    ("before", "workspace"),
    [
        ("torch.backends.fp32_precision = 'tf32'; torch.backends.cudnn.conv.fp32_precision = 'tf32'", None),
        ("torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = True", ":16:8"),
    ],
    ids=["a precision was chosen", "by the older settings, and a workspace"],
)
def test_a_prepared_process_is_deterministic_and_precise(before, workspace):
    """Whatever was set before; a workspace that the user chose is kept."""
    environment = os.environ | ({"CUBLAS_WORKSPACE_CONFIG": workspace} if workspace else {})
    program = [sys.executable, "-c", REPORT.format(before=before)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    expected = ["True", "False", "False", "False", "False", "1", *["ieee"] * 5, workspace or ":4096:8", "False"]
    assert done.stdout.split() == expected, done.stderr


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_cannot_be_used_is_named(device):
    compute = local_compute(device=device)
    before = torch.is_grad_enabled()
    with pytest.raises(UserError, match=f"compute.device: '{device}' cannot be used here: "):
        prepare_torch(compute)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(before)


def test_the_name_of_a_device_is_checked_without_the_device():
    check_device_name("cuda:99")
    with pytest.raises(UserError, match="compute.device: 'abacus' cannot be used here: Expected one of cpu, cuda"):
        check_device_name("abacus")


def test_versions_are_those_of_the_imported_packages():
    import av
    import diffusers
    import numpy
    import PIL
    import tokenizers
    import transformers

    modules = {"torch": torch, "numpy": numpy, "diffusers": diffusers, "transformers": transformers, "av": av}
    modules |= {"pillow": PIL, "tokenizers": tokenizers}
    found = numerics_versions("cpu", ARITHMETIC + SAMPLING)
    assert set(found) == {*modules, "ftfy"}
    assert {name: found[name] for name in modules} == {name: str(m.__version__) for name, m in modules.items()}


def test_versions_are_read_without_importing_the_packages():
    program = (
        "import sys; from stepquant.torch_setup import *; numerics_versions('cpu', ARITHMETIC + SAMPLING);"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_gpu_is_named_with_its_libraries_but_without_its_index(monkeypatch):
    names = {"cuda": "NVIDIA H100", "cuda:0": "NVIDIA H100", "cuda:1": "NVIDIA H100"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    expected = {"gpu": "NVIDIA H100", "compute capability": "9.0", "cuda": "13.0", "cudnn": "91300"}
    assert numerics_versions("cuda:1") == numerics_versions("cuda") == numerics_versions("cpu") | expected


@pytest.mark.parametrize("stage", COMPUTING)
def test_the_set_up_is_part_of_the_code_of_every_stage_that_computes(stage, tmp_path):
    files = source_files(ROOT / f"stages/{stage}.py", CODE)
    setup = Path(torch_setup.__file__)
    assert setup in files
    changed = tmp_path / "torch_setup.py"
    changed.write_text(setup.read_text().replace('"ieee"', '"tf32"'))
    assert code_digest([changed if file == setup else file for file in files]) != code_digest(files)
