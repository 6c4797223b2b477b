"""benchmarks/gpu.py on the CPU, with a small linear: what it writes, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.workspace import ROOT


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", "--parts", "linear", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_page_names_the_device_and_has_a_row_per_format(tmp_path):
    result = run(tmp_path / "gpu.md", "--device", "cpu", "--tokens", "64", "--inputs", "128", "--outputs", "64")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("# On a GPU\n\ncpu (")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["bf16", "int4", "mxfp4", "nvfp4"]


def test_a_part_that_fails_is_on_the_page(tmp_path):
    """65 inputs cannot be cut into groups."""
    result = run(tmp_path / "gpu.md", "--device", "cpu", "--tokens", "64", "--inputs", "65", "--outputs", "64")
    assert result.returncode == 1
    page = (tmp_path / "gpu.md").read_text()
    assert "## Linear\n\nFAILED:" in page and "65 channels" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path):
    result = run(tmp_path / "gpu.md")
    assert result.returncode == 2
    assert "error: --device cuda:0: this torch" in result.stderr and "sees no GPU" in result.stderr
    assert not (tmp_path / "gpu.md").exists()
