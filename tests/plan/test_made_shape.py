"""A made shape is what it says: sharded as diffusers shards, heavy-tailed, with outlier channels at every site."""

import json
from itertools import pairwise

import pytest
import torch

from benchmarks.make_shape import EXPERT, Shape, bin_edges, shards
from stepquant.calibration.statistics_files import read_statistics, site_folder
from stepquant.models.checks.scheduler import sampler_timesteps
from stepquant.models.weights import open_weights
from stepquant.plan.published import SCHEDULER
from tests.wan import SITES


def test_weights_have_the_tails_of_student_s_t(made):
    """Beyond 4 standard deviations lies 0.48 % of a t with 4 degrees of freedom, 0.006 % of a normal."""
    weight = open_weights(made / "model/transformer").get("blocks.1.attn1.to_q.weight").float()
    assert weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert (weight.abs() > 4 * 256**-0.5).float().mean().item() == pytest.approx(0.0048, abs=0.0012)


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_every_site_has_outlier_channels(made, site):
    for block in (0, 1):
        hessian = read_statistics(
            site_folder(made / f"artifacts/activations/{EXPERT}.zarr", block, site.name), "cpu"
        ).hessian
        size = hessian.diagonal().sqrt()
        assert size.max() > 3 * size.median()  # of 256 channels one is an outlier, of 5,120 there are 25


def test_a_shard_per_block_and_one_for_the_rest(made):
    folder = made / "model/transformer"
    places = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    assert {places[key] for key in places if key.startswith("blocks.1.")} == {
        "diffusion_pytorch_model-00002-of-00003.safetensors"
    }
    assert {places[key] for key in places if not key.startswith("blocks.")} == {
        "diffusion_pytorch_model-00003-of-00003.safetensors"
    }


def test_the_seed_decides():
    shape = Shape(blocks=1, width=64, ffn=64, heads=1, text_dim=16)
    first, again, other = (next(shards(shape, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["blocks.0.attn1.to_q.weight"], other["blocks.0.attn1.to_q.weight"])


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_every_bin_has_a_step(steps):
    edges, times = bin_edges(steps), sampler_timesteps(SCHEDULER, steps, 1.0)
    assert len(edges) == min(3, steps) + 1
    assert all(any(high >= t > low for t in times) for high, low in pairwise(edges))
