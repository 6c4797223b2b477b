"""benchmarks/gpu.py on the CPU, with a small linear: what it writes, and what it refuses."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def run(monkeypatch) -> Callable[..., int]:
    """The benchmark's exit code for a page to write and other arguments."""

    def main(out: Path, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "linear", "--out", str(out), *arguments])
        return gpu.main()

    return main


def test_the_page_names_the_device_and_has_a_row_per_format(tmp_path, run):
    code = run(tmp_path / "gpu.md", "--device", "cpu", "--tokens", "64", "--inputs", "128", "--outputs", "64")
    assert code == 0
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("# On a GPU\n\ncpu (")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["bf16", "int4", "mxfp4", "nvfp4"]


def test_a_part_that_fails_is_on_the_page(tmp_path, run):
    """65 inputs cannot be cut into groups."""
    code = run(tmp_path / "gpu.md", "--device", "cpu", "--tokens", "64", "--inputs", "65", "--outputs", "64")
    assert code == 1
    page = (tmp_path / "gpu.md").read_text()
    assert "## Linear\n\nFAILED:" in page and "65 channels" in page


def test_without_a_gpu_nothing_is_written(tmp_path, run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tmp_path / "gpu.md") == 2
    message = capsys.readouterr().err
    assert "error: --device cuda:0: this torch" in message and "sees no GPU" in message
    assert not (tmp_path / "gpu.md").exists()
