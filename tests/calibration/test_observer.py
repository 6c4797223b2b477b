import itertools

import numpy as np
import pytest
import torch

from stepquant.calibration import observer
from stepquant.calibration.observer import SiteObserver, merge_shards, plan_sampling
from stepquant.calibration.statistics_files import read_statistics, site_folder
from stepquant.calibration.trajectories import Call
from stepquant.errors import UserError
from stepquant.models.bins import Bins
from stepquant.storage.zarr_groups import open_group

TOKENS, CHANNELS = 10, 6
BINS = Bins((1000.0, 900.0, 500.0, 0.0))
# Four steps in bin 1 but one in bin 0 and one in bin 2, so that equal weights of calls and of bins differ.
TIMES = [950.0, 900.0, 800.0, 700.0, 600.0, 300.0]
SPLITS = {"dog": "calibration", "car": "calibration", "fox": "validation", "cat": "heldout"}
CALLS = [Call(p, SPLITS[p], step, branch, t) for p in SPLITS for step, t in enumerate(TIMES) for branch in (0, 1)]
SAMPLES = {"calibration": 7, "validation": 4, "heldout": 5}


@pytest.fixture
def x():
    """The site's input in every call, [calls, TOKENS, CHANNELS]: no two tokens are equal."""
    return torch.randn(len(CALLS), TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text():
    """The input of a site that does not depend on t: the same at every step, by prompt and branch."""
    generator = torch.Generator().manual_seed(1)
    by_prompt = {key: torch.randn(TOKENS, CHANNELS, generator=generator) for key in itertools.product(SPLITS, (0, 1))}
    return torch.stack([by_prompt[call.prompt, call.branch] for call in CALLS])


def collect(folder, x, bins, chunk, seed=0, samples=SAMPLES, shard=len(CALLS), stride=1):
    """Run the calls through SiteObserver in shards of chunks, add up, write, and read back."""
    plan = plan_sampling(CALLS, bins, TOKENS, samples, seed, stride=stride)
    shards = []
    for first in range(0, len(CALLS), shard):
        site = SiteObserver(CHANNELS, plan, "cpu", "low_noise block 0 attn1.qkv")
        calls = range(len(CALLS))[first : first + shard]
        for start in range(calls.start, calls.stop, chunk):
            positions = range(start, min(start + chunk, calls.stop))
            site.observe(x[positions.start : positions.stop], [CALLS[i] for i in positions], positions)
        shards.append(site.tensors())
    merge_shards(folder, shards)
    return read_statistics(folder, "cpu")


def tokens_of(x, split, b):
    """All tokens of a split in a bin, float64: bin 0 is t > 900, bin 2 is t <= 500."""
    bin_of = [0 if c.t > 900 else 1 if c.t > 500 else 2 for c in CALLS]
    return torch.cat([x[i] for i, c in enumerate(CALLS) if c.split == split and bin_of[i] == b]).double()


def rows_in(sample, tokens):
    """For each row of the sample, which row of the tokens it is; each row must be found exactly once."""
    equal = (sample.double()[:, None] == tokens[None]).all(-1)
    assert torch.equal(equal.sum(1), torch.ones(len(sample), dtype=torch.int64))
    return equal.int().argmax(1).tolist()


def same_samples(a, b) -> bool:
    pairs = zip(a.search + a.validation + a.heldout, b.search + b.validation + b.heldout, strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_the_second_moment_is_the_mean_over_bins_of_each_bin_s_mean(tmp_path, x):
    found = collect(tmp_path, x, BINS, chunk=5)
    per_bin = [tokens_of(x, "calibration", b) for b in range(3)]
    assert [len(tokens) for tokens in per_bin] == [40, 160, 40]
    expected = sum(tokens.T @ tokens / len(tokens) for tokens in per_bin) / 3
    assert torch.allclose(found.hessian_about(torch.zeros(CHANNELS)).double(), expected, rtol=0, atol=1e-6)
    assert found.hessian.dtype == torch.float32


def test_second_moments_about_a_point(tmp_path, x):
    """Also where the mean is 10,000 times the spread, which float32 squares would not survive."""
    x = x + 1e4
    found = collect(tmp_path, x, BINS, chunk=5)
    point = found.mean.mean(0) + 0.1
    per_bin = [tokens_of(x, "calibration", b) - point.double() for b in range(3)]
    expected = sum(tokens.T @ tokens / len(tokens) for tokens in per_bin) / 3
    assert torch.allclose(found.hessian_about(point).double(), expected, rtol=0, atol=2e-3)
    assert torch.allclose(found.variance_about(point).double(), expected.diagonal(), rtol=0, atol=2e-3)


def test_panels_and_slabs_that_end_unevenly_change_nothing(tmp_path, x, monkeypatch):
    """Six channels in panels of 4 and 2, ten tokens in slabs of 4, 4 and 2."""
    whole = collect(tmp_path / "whole", x, BINS, chunk=5)
    monkeypatch.setattr(observer, "PANEL", 4)
    monkeypatch.setattr(observer, "SLAB", 4)
    cut = collect(tmp_path / "cut", x, BINS, chunk=5)
    for name in ("hessian", "absmax", "mean"):
        assert torch.allclose(getattr(cut, name), getattr(whole, name), rtol=0, atol=1e-6)
    assert same_samples(cut, whole)


def test_what_a_gpu_may_do_with_products_is_put_back(tmp_path, x, monkeypatch):
    """TF32 for bfloat16 inputs alone, and only meanwhile."""
    allowed = []
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda self, *args, **kwargs: allowed.append(torch.backends.cuda.matmul.fp32_precision == "tf32")
    )
    for dtype in (torch.bfloat16, torch.float32):
        collect(tmp_path / str(dtype), x.to(dtype), BINS, chunk=5)
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    half = len(allowed) // 2
    assert allowed == [True] * half + [False] * half


def test_absmax_and_mean_are_per_bin(tmp_path, x):
    found = collect(tmp_path, x, BINS, chunk=5)
    for b in range(3):
        tokens = tokens_of(x, "calibration", b)
        assert torch.equal(found.absmax[b].double(), tokens.abs().amax(0))
        assert torch.allclose(found.mean[b].double(), tokens.mean(0), rtol=0, atol=1e-6)
    assert open_group(tmp_path).attrs["tokens"] == [40, 160, 40]


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_what_is_not_calibration_enters_nothing_but_its_own_sample(tmp_path, x, split):
    before = collect(tmp_path / "before", x, BINS, chunk=5)
    changed = [i for i, call in enumerate(CALLS) if call.split == split]
    x[changed] = 1000 + torch.rand(len(changed), TOKENS, CHANNELS, generator=torch.Generator().manual_seed(9))
    after = collect(tmp_path / "after", x, BINS, chunk=5)
    for name in ("hessian", "absmax", "mean"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    other = {"validation": "heldout", "heldout": "validation"}[split]
    for b in range(3):
        assert all(torch.equal(getattr(after, name)[b], getattr(before, name)[b]) for name in ("search", other))
        assert getattr(after, split)[b].min() >= 1000


def test_samples_are_tokens_of_their_split_and_bin_without_replacement(tmp_path, x):
    found = collect(tmp_path, x, BINS, chunk=5)
    for b in range(3):
        for split, sample in {
            "calibration": found.search[b],
            "validation": found.validation[b],
            "heldout": found.heldout[b],
        }.items():
            rows = rows_in(sample, tokens_of(x, split, b))
            assert len(rows) == len(set(rows)) == SAMPLES[split]


def test_a_sample_larger_than_the_bin_is_the_whole_bin(tmp_path, x):
    found = collect(tmp_path, x, BINS, chunk=5, samples={"calibration": 100, "validation": 10_000, "heldout": 10_000})
    for b, size in enumerate((40, 100, 40)):
        assert len(found.search[b]) == size
        assert sorted(rows_in(found.heldout[b], tokens_of(x, "heldout", b))) == list(
            range(len(tokens_of(x, "heldout", b)))
        )


def test_nothing_depends_on_how_calls_are_chunked(tmp_path, x):
    results = [collect(tmp_path / str(chunk), x, BINS, chunk) for chunk in (1, 5, len(CALLS))]
    for other in results[1:]:
        for name in ("hessian", "absmax", "mean"):
            assert torch.equal(getattr(other, name), getattr(results[0], name))
        assert same_samples(other, results[0])


@pytest.mark.parametrize("shard", [1, 5, 12, 30])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_shares_add_up_to_the_whole(tmp_path, x, shard, offset):
    """Whatever is not a sum is equal, and sums agree to rounding, also where the mean is 10,000 times the spread.

    The last 24 calls are no calibration: among the shards of 1, 5 and 12 are some without a calibration token.
    """
    x = x + offset
    whole, found = (
        collect(tmp_path / "whole", x, BINS, chunk=5),
        collect(tmp_path / "shards", x, BINS, chunk=5, shard=shard),
    )
    assert same_samples(found, whole)
    for name in ("shift", "absmax"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    assert open_group(tmp_path / "shards").attrs["tokens"] == [40, 160, 40]
    assert torch.allclose(found.mean, whole.mean, rtol=2e-7, atol=1e-6)
    assert torch.allclose(found.hessian, whole.hessian, rtol=0, atol=2e-6 if offset == 0 else 4e-3)


def test_a_stride_sums_every_third_token_from_another_one_in_each_call(tmp_path, x):
    """Of ten tokens calls 0, 3, ... take 0, 3, 6, 9, calls 1, 4, ... take 1, 4, 7; samples and the largest magnitudes are of all."""
    whole, found = (
        collect(tmp_path / "whole", x, BINS, chunk=5),
        collect(tmp_path / "third", x, BINS, chunk=5, shard=7, stride=3),
    )
    bin_of = [0 if c.t > 900 else 1 if c.t > 500 else 2 for c in CALLS]
    taken = [
        [x[i][i % 3 :: 3].double() for i, c in enumerate(CALLS) if c.split == "calibration" and bin_of[i] == b]
        for b in range(3)
    ]
    per_bin = [torch.cat(tokens) for tokens in taken]
    assert open_group(tmp_path / "third").attrs["tokens"] == [len(tokens) for tokens in per_bin]
    assert torch.allclose(found.mean.double(), torch.stack([tokens.mean(0) for tokens in per_bin]), rtol=0, atol=1e-6)
    expected = sum(tokens.T @ tokens / len(tokens) for tokens in per_bin) / 3
    assert torch.allclose(found.hessian_about(torch.zeros(CHANNELS)).double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(found.absmax, whole.absmax)
    assert same_samples(found, whole)


def test_a_site_without_t_sums_every_token_whatever_the_stride(tmp_path, text):
    whole, found = (
        collect(tmp_path / "whole", text, None, chunk=5),
        collect(tmp_path / "third", text, None, chunk=5, stride=3),
    )
    assert torch.equal(found.hessian, whole.hessian) and torch.equal(found.mean, whole.mean)


def test_shares_of_a_site_without_t(tmp_path, text):
    """Only the first of its shards holds anything new."""
    whole, found = (
        collect(tmp_path / "whole", text, None, chunk=4),
        collect(tmp_path / "shards", text, None, chunk=4, shard=4),
    )
    assert torch.allclose(found.hessian, whole.hessian, rtol=0, atol=1e-6)
    assert torch.equal(found.search[0], whole.search[0]) and torch.equal(found.heldout[0], whole.heldout[0])


def test_the_choice_follows_the_seed():
    def chosen(seed):
        plan = plan_sampling(CALLS, BINS, TOKENS, SAMPLES, seed, stride=1)
        return [rows.tolist() for rows in plan.rows]

    assert chosen(3) == chosen(3) != chosen(4)


def test_every_token_is_as_likely_as_any_other():
    """20 x 20 draws of 7 out of 40 in bin 0, calibration: each call should get a quarter. 700 +- 5 deviations of about 22."""
    members = [i for i, c in enumerate(CALLS) if c.split == "calibration" and c.t > 900]
    drawn = np.array(
        [
            [len(plan_sampling(CALLS, BINS, TOKENS, SAMPLES, seed, stride=1).rows[i]) for i in members]
            for seed in range(400)
        ]
    ).sum(0)
    assert drawn.sum() == 400 * 7
    assert np.abs(drawn - 700).max() < 110


def test_a_site_without_t_counts_each_prompt_and_branch_once(tmp_path, text):
    found = collect(tmp_path, text, None, chunk=5)
    once = {(c.prompt, c.branch): text[i].double() for i, c in enumerate(CALLS)}
    tokens = torch.cat([once[p, branch] for p in ("dog", "car") for branch in (0, 1)])
    assert open_group(tmp_path).attrs["tokens"] == [40]
    assert torch.allclose(
        found.hessian_about(torch.zeros(CHANNELS)).double(), tokens.T @ tokens / 40, rtol=0, atol=1e-6
    )
    assert torch.equal(found.absmax.double(), tokens.abs().amax(0)[None])
    assert torch.allclose(found.mean.double(), tokens.mean(0)[None], rtol=0, atol=1e-6)
    assert len(found.search) == len(found.heldout) == 1
    assert len(set(rows_in(found.search[0], tokens))) == 7
    assert len(set(rows_in(found.heldout[0], torch.cat([once["cat", 0], once["cat", 1]])))) == 5


def test_bfloat16_samples_stay_what_they_were(tmp_path, x):
    x = x.bfloat16()
    found = collect(tmp_path, x, BINS, chunk=5)
    rows_in(found.search[1], tokens_of(x, "calibration", 1))
    assert open_group(tmp_path)["samples"].dtype == "uint16"
    tokens = [tokens_of(x, "calibration", b) for b in range(3)]
    assert torch.allclose(
        found.hessian_about(torch.zeros(CHANNELS)).double(),
        sum(t.T @ t / len(t) for t in tokens) / 3,
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_is_refused_with_its_place(bad, x):
    site = SiteObserver(
        CHANNELS, plan_sampling(CALLS, BINS, TOKENS, SAMPLES, 0, stride=1), "cpu", "low_noise block 3 ffn.up"
    )
    x[2, 4, 1] = bad
    with pytest.raises(UserError) as caught:
        site.observe(x[:4], CALLS[:4], range(4))
    place = "low_noise block 3 ffn.up (prompt dog, t = 900)"
    assert (
        str(caught.value)
        == f"{place}: NaN or Inf in a calibration activation; check the model, or use another compute.dtype"
    )


def test_a_bin_that_no_step_falls_into_is_refused():
    with pytest.raises(UserError) as caught:
        plan_sampling(CALLS, Bins((1000.0, 990.0, 0.0)), TOKENS, SAMPLES, 0, stride=1)
    assert str(caught.value).startswith(
        "bins: no recorded calibration step has t in bin 0, (990, 1000]; use fewer or wider bins"
    )


def test_a_split_without_calls_is_refused():
    calls = [call for call in CALLS if call.split != "heldout"]
    with pytest.raises(UserError, match="trajectories: no call of split 'heldout'"):
        plan_sampling(calls, None, TOKENS, SAMPLES, 0, stride=1)
    with pytest.raises(UserError, match="bins: no recorded heldout step has t in bin 0"):
        plan_sampling(calls, BINS, TOKENS, SAMPLES, 0, stride=1)


def test_a_site_is_three_arrays_of_one_file(tmp_path, x):
    """40 blocks of 7 sites, with the metadata of each array and group, are 1,960 files."""
    collect(tmp_path, x, BINS, chunk=5)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    arrays = ("channels", "samples", "hessian")
    assert found == {"zarr.json", *(f"{name}/zarr.json" for name in arrays), *(f"{name}/c/0/0" for name in arrays)}
    assert 40 * 7 * len(found) == 1960


def test_where_a_site_lies(tmp_path):
    assert site_folder(tmp_path, 3, "attn1.qkv") == tmp_path / "block_03" / "attn1.qkv"
