"""How often a checkpoint is read to measure its layers."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from stepquant.evaluate import packed_layers
from tests.wan import SITES

BLOCKS, BINS = 2, 3


class Expert:
    """An expert whose linears are 4 x 4 identities."""

    def linear_weight(self, index, linear):
        return torch.eye(4)

    def linear_bias(self, index, linear):
        return torch.zeros(4)


class Linear:
    """Twice the identity: a relative error of 1. Takes the current bin in either form that a linear has had."""

    def __init__(self):
        self.bin = SimpleNamespace(set=lambda value: None, fill_=lambda value: None)

    def __call__(self, x):
        return 2 * x


@pytest.fixture
def reads(monkeypatch):
    """Counts the reads of every linear."""
    counts = Counter()

    def read_linear(weights, settings, target, device):
        counts[target] += 1
        return Linear()

    replacements = {
        "read_linear": read_linear,
        "open_weights": lambda folder: None,
        "read_settings": lambda folder: SimpleNamespace(bins=BINS),
        "open_expert": lambda *args: Expert(),
        "read_statistics": lambda *args: SimpleNamespace(heldout=[torch.ones(5, 4)] * BINS),
        "site_folder": lambda *args: None,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(packed_layers, name, replacement)
    return counts


def test_every_linear_is_read_once_for_all_bins(reads, tmp_path):
    described = SimpleNamespace(subfolder="transformer", blocks=BLOCKS, ordered_sites=SITES)
    manifest, compute = SimpleNamespace(experts={"denoiser": described}), SimpleNamespace(device="cpu")
    found = list(packed_layers.layer_errors(manifest, compute, tmp_path, lambda expert: tmp_path))
    assert reads == {f"blocks.{i}.{path}": 1 for i in range(BLOCKS) for site in SITES for path in site.linears}
    assert len(found) == BLOCKS * len(SITES) * BINS and {error.error for error in found} == {1.0}
