"""The statistics of one shard with all calls, against float64 sums over its tokens."""

import pytest
import torch

from stepquant.calibration import observer
from stepquant.calibration.observer import SiteObserver
from stepquant.errors import UserError
from stepquant.storage.zarr_groups import open_group
from tests.calibration.calls import BIN_OF, BINS, CALLS, CHANNELS, collect, make_plan, rows_in, same_samples, tokens_of


def test_the_hessian_is_the_mean_over_bins_of_each_bin_s_mean(tmp_path, x):
    found = collect(tmp_path, x, BINS, chunk=5)
    per_bin = [tokens_of(x, "calibration", b) for b in range(3)]
    assert [len(tokens) for tokens in per_bin] == [40, 160, 40]
    expected = sum(tokens.T @ tokens / len(tokens) for tokens in per_bin) / 3
    assert torch.allclose(found.hessian_about(torch.zeros(CHANNELS)).double(), expected, rtol=0, atol=1e-6)
    assert found.hessian.dtype == torch.float32


def test_the_hessian_about_a_point(tmp_path, x):
    """Also if the mean is 10,000 times the spread, where float32 sums of x xᵀ would be useless."""
    x = x + 1e4
    found = collect(tmp_path, x, BINS, chunk=5)
    point = found.mean.mean(0) + 0.1
    per_bin = [tokens_of(x, "calibration", b) - point.double() for b in range(3)]
    expected = sum(tokens.T @ tokens / len(tokens) for tokens in per_bin) / 3
    assert torch.allclose(found.hessian_about(point).double(), expected, rtol=0, atol=2e-3)
    assert torch.allclose(found.variance_about(point).double(), expected.diagonal(), rtol=0, atol=2e-3)


def test_uneven_panels_and_slabs_change_nothing(tmp_path, x, monkeypatch):
    """Six channels in panels of 4 and 2, ten tokens in slabs of 4, 4 and 2."""
    whole = collect(tmp_path / "whole", x, BINS, chunk=5)
    monkeypatch.setattr(observer, "PANEL", 4)
    monkeypatch.setattr(observer, "SLAB", 4)
    cut = collect(tmp_path / "cut", x, BINS, chunk=5)
    for name in ("hessian", "absmax", "mean"):
        assert torch.allclose(getattr(cut, name), getattr(whole, name), rtol=0, atol=1e-6)
    assert same_samples(cut, whole)


@pytest.fixture
def matmul():
    """torch's settings of products on a GPU, which the test may change. They inherit none from the process."""
    process, settings = torch.backends, torch.backends.cuda.matmul
    before = process.fp32_precision, settings.fp32_precision
    process.fp32_precision = "none"
    yield settings
    process.fp32_precision, settings.fp32_precision = before


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, "tf32"), (torch.float32, "ieee")])
def test_the_precision_of_products_is_set_and_restored(x, matmul, monkeypatch, before, dtype, expected):
    """Also if another module has set it: reading the older allow_tf32 would then raise."""
    matmul.fp32_precision = before
    used = []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *_, **__: used.append(matmul.fp32_precision))
    site = SiteObserver(CHANNELS, make_plan(), "cpu", "low_noise block 0 attn1.qkv")
    site.observe(x.to(dtype), CALLS, range(len(CALLS)))
    assert set(used) == {expected}
    assert matmul.fp32_precision == before


def test_the_precision_of_products_is_restored_after_a_failure(x, matmul, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    matmul.fp32_precision = "ieee"
    monkeypatch.setattr(torch.Tensor, "addmm_", fail)
    site = SiteObserver(CHANNELS, make_plan(), "cpu", "low_noise block 0 attn1.qkv")
    with pytest.raises(RuntimeError, match="out of memory"):
        site.observe(x.bfloat16(), CALLS, range(len(CALLS)))
    assert matmul.fp32_precision == "ieee"


def test_absmax_and_mean_are_per_bin(tmp_path, x):
    found = collect(tmp_path, x, BINS, chunk=5)
    for b in range(3):
        tokens = tokens_of(x, "calibration", b)
        assert torch.equal(found.absmax[b].double(), tokens.abs().amax(0))
        assert torch.allclose(found.mean[b].double(), tokens.mean(0), rtol=0, atol=1e-6)
    assert open_group(tmp_path).attrs["tokens"] == [40, 160, 40]


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_other_splits_contribute_to_their_own_sample_only(tmp_path, x, split):
    before = collect(tmp_path / "before", x, BINS, chunk=5)
    changed = [i for i, call in enumerate(CALLS) if call.split == split]
    x[changed] = 1000 + torch.rand(len(changed), *x.shape[1:], generator=torch.Generator().manual_seed(9))
    after = collect(tmp_path / "after", x, BINS, chunk=5)
    for name in ("hessian", "absmax", "mean"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    other = {"validation": "heldout", "heldout": "validation"}[split]
    for b in range(3):
        assert all(torch.equal(getattr(after, name)[b], getattr(before, name)[b]) for name in ("search", other))
        assert getattr(after, split)[b].min() >= 1000


def test_chunks_of_any_size_give_the_same_bytes(tmp_path, x):
    results = [collect(tmp_path / str(chunk), x, BINS, chunk) for chunk in (1, 5, len(CALLS))]
    for other in results[1:]:
        for name in ("hessian", "absmax", "mean"):
            assert torch.equal(getattr(other, name), getattr(results[0], name))
        assert same_samples(other, results[0])


def test_a_stride_sums_every_third_token(tmp_path, x):
    """Calls 0, 3, ... of the first prompt sum tokens 0, 3, 6, 9; in the second prompt calls 2, 5, ... do.

    Samples and absmax use all tokens.
    """
    whole = collect(tmp_path / "whole", x, BINS, chunk=5)
    found = collect(tmp_path / "third", x, BINS, chunk=5, shard=7, stride=3)
    first = [i % 3 for i in range(12)] + [(i + 1) % 3 for i in range(12)]
    per_bin = [
        torch.cat([x[i][offset::3].double() for i, offset in enumerate(first) if BIN_OF[i] == b]) for b in range(3)
    ]
    assert open_group(tmp_path / "third").attrs["tokens"] == [len(tokens) for tokens in per_bin]
    assert torch.allclose(found.mean.double(), torch.stack([tokens.mean(0) for tokens in per_bin]), rtol=0, atol=1e-6)
    expected = sum(tokens.T @ tokens / len(tokens) for tokens in per_bin) / 3
    assert torch.allclose(found.hessian_about(torch.zeros(CHANNELS)).double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(found.absmax, whole.absmax)
    assert same_samples(found, whole)


def test_a_site_without_t_sums_every_token_at_any_stride(tmp_path, text):
    whole = collect(tmp_path / "whole", text, None, chunk=5)
    found = collect(tmp_path / "third", text, None, chunk=5, stride=3)
    assert torch.equal(found.hessian, whole.hessian) and torch.equal(found.mean, whole.mean)


def test_a_site_without_t_counts_each_prompt_and_branch_once(tmp_path, text):
    found = collect(tmp_path, text, None, chunk=5)
    once = {(c.prompt, c.branch): text[i].double() for i, c in enumerate(CALLS)}
    tokens = torch.cat([once[p, branch] for p in ("dog", "car") for branch in (0, 1)])
    assert open_group(tmp_path).attrs["tokens"] == [40]
    hessian = found.hessian_about(torch.zeros(CHANNELS)).double()
    assert torch.allclose(hessian, tokens.T @ tokens / 40, rtol=0, atol=1e-6)
    assert torch.equal(found.absmax.double(), tokens.abs().amax(0)[None])
    assert torch.allclose(found.mean.double(), tokens.mean(0)[None], rtol=0, atol=1e-6)
    assert len(found.search) == len(found.heldout) == 1
    assert len(set(rows_in(found.search[0], tokens))) == 7
    assert len(set(rows_in(found.heldout[0], torch.cat([once["cat", 0], once["cat", 1]])))) == 5


def test_bfloat16_samples_are_stored_as_bfloat16(tmp_path, x):
    x = x.bfloat16()
    found = collect(tmp_path, x, BINS, chunk=5)
    rows_in(found.search[1], tokens_of(x, "calibration", 1))
    assert open_group(tmp_path)["samples"].dtype == "uint16"
    tokens = [tokens_of(x, "calibration", b) for b in range(3)]
    hessian = found.hessian_about(torch.zeros(CHANNELS)).double()
    assert torch.allclose(hessian, sum(t.T @ t / len(t) for t in tokens) / 3, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_is_refused_and_the_first_call_is_named(bad, x):
    site = SiteObserver(CHANNELS, make_plan(), "cpu", "low_noise block 3 ffn.up")
    x[2, 4, 1] = x[3, 0, 0] = x[30, 0, 0] = bad
    for positions in (range(4), range(4, len(CALLS))):
        site.observe(x[positions.start : positions.stop], [CALLS[i] for i in positions], positions)
    with pytest.raises(UserError) as caught:
        site.tensors()
    place = "low_noise block 3 ffn.up (prompt dog, t = 900)"
    reason = "NaN or Inf in a calibration activation; check the model, or use another compute.dtype"
    assert str(caught.value) == f"{place}: {reason}"


def test_nan_in_another_split_is_refused(x):
    site = SiteObserver(CHANNELS, make_plan(), "cpu", "low_noise block 3 ffn.up")
    x[30, 0, 0] = float("nan")
    site.observe(x, CALLS, range(len(CALLS)))
    with pytest.raises(UserError, match=r"\(prompt fox, t = 700\): NaN or Inf"):
        site.tensors()


def test_observing_reads_nothing_back_from_the_device():
    """The meta device has no values: a copy to the host, or a decision that depends on a value, would raise."""
    x = torch.empty(len(CALLS), 10, CHANNELS, device="meta")
    site = SiteObserver(CHANNELS, make_plan(stride=3), x.device, "low_noise block 0 attn1.qkv")
    site.observe(x, CALLS, range(len(CALLS)))
    assert site.tokens == [
        sum(10 // 3 + ((i // 12 + i) % 3 == 0) for i in range(24) if BIN_OF[i] == b) for b in range(3)
    ]
    for sums in (site.hessian, site.first_moment, site.absmax, site.total):
        assert sums.device == x.device
