"""Shards of the calls give what all calls give at once."""

import pytest
import torch

from stepquant.storage.zarr_groups import open_group
from tests.calibration.calls import BINS, collect, same_samples


@pytest.mark.parametrize("shard", [1, 5, 12, 30])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_shards_add_up_to_the_whole(tmp_path, x, shard, offset):
    """What is not a sum is equal, and sums agree up to rounding, also if the mean is 10,000 times the spread.

    The last 24 calls are no calibration calls: some of the shards of 1, 5 and 12 calls have no calibration token.
    """
    x = x + offset
    whole = collect(tmp_path / "whole", x, BINS, chunk=5)
    found = collect(tmp_path / "shards", x, BINS, chunk=5, shard=shard)
    assert same_samples(found, whole)
    for name in ("shift", "absmax"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert open_group(tmp_path / "shards").attrs["tokens"] == [40, 160, 40]
    assert torch.allclose(found.mean, whole.mean, rtol=2e-7, atol=1e-6)
    assert torch.allclose(found.hessian, whole.hessian, rtol=0, atol=2e-6 if offset == 0 else 4e-3)


def test_shards_of_a_site_without_t(tmp_path, text):
    """Only the first shard of a prompt has tokens that count."""
    whole = collect(tmp_path / "whole", text, None, chunk=4)
    found = collect(tmp_path / "shards", text, None, chunk=4, shard=4)
    assert torch.allclose(found.hessian, whole.hessian, rtol=0, atol=1e-6)
    assert torch.equal(found.search[0], whole.search[0]) and torch.equal(found.heldout[0], whole.heldout[0])
