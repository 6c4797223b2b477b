"""Which tokens a site's statistics use."""

import numpy as np
import pytest

from stepquant.calibration.sampling_plan import plan_sampling
from stepquant.calibration.trajectories import Call
from stepquant.errors import UserError
from stepquant.models.bins import Bins
from tests.calibration.calls import BIN_OF, BINS, CALLS, SAMPLES, TOKENS, collect, make_plan, rows_in, tokens_of

STEPS = [950.0, 920.0, 800.0, 700.0, 400.0, 300.0]


def test_samples_are_tokens_of_their_split_and_bin_without_replacement(tmp_path, x):
    found = collect(tmp_path, x, BINS, chunk=5)
    for b in range(3):
        samples = {"calibration": found.search[b], "validation": found.validation[b], "heldout": found.heldout[b]}
        for split, sample in samples.items():
            rows = rows_in(sample, tokens_of(x, split, b))
            assert len(rows) == len(set(rows)) == SAMPLES[split]


def test_a_sample_larger_than_the_bin_is_the_whole_bin(tmp_path, x):
    found = collect(tmp_path, x, BINS, chunk=5, samples={"calibration": 100, "validation": 10_000, "heldout": 10_000})
    for b, size in enumerate((40, 100, 40)):
        tokens = tokens_of(x, "heldout", b)
        assert len(found.search[b]) == size
        assert sorted(rows_in(found.heldout[b], tokens)) == list(range(len(tokens)))


def test_the_choice_follows_the_seed():
    def chosen(seed):
        return [call.rows.tolist() for call in make_plan(seed=seed).calls]

    assert chosen(3) == chosen(3) != chosen(4)


def test_every_token_is_equally_likely():
    """400 draws of 7 out of 40 in bin 0: each of four calls gets 700 on average, standard deviation about 22."""
    members = [i for i, call in enumerate(CALLS) if call.split == "calibration" and BIN_OF[i] == 0]
    drawn = np.array([[len(make_plan(seed=seed).calls[i].rows) for i in members] for seed in range(400)]).sum(0)
    assert drawn.sum() == 400 * 7
    assert np.abs(drawn - 700).max() < 110


def columns(calls, stride, width=52, height=30):
    """The image columns modulo the stride that each (step, branch) sums, of calibration prompts."""
    plan = plan_sampling(calls, BINS, width * height, SAMPLES, 0, stride=stride)
    found = {}
    for i, call in enumerate(calls):
        if call.split == "calibration":
            tokens = range(width * height)[plan.summed(i)]
            found.setdefault((call.step, call.branch), set()).update(token % width % stride for token in tokens)
    return found


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_step_and_branch_sums_every_image_column(shuffled):
    """12 calls per prompt and 52 patches per image row are multiples of the stride. Splits can alternate."""
    prompts = [(f"{split}_{i}", split) for i in range(4) for split in ("calibration", "validation", "heldout")]
    if not shuffled:
        prompts.sort()
    calls = [
        Call(name, split, step, branch, t)
        for name, split in prompts
        for step, t in enumerate(STEPS)
        for branch in (0, 1)
    ]
    found = columns(calls, stride=4)
    assert len(found) == 12
    assert all(residues == {0, 1, 2, 3} for residues in found.values())


def test_the_calls_of_a_prompt_sum_every_image_column():
    calls = [Call(split, split, step, 0, t) for split in SAMPLES for step, t in enumerate(STEPS)]
    assert set.union(*columns(calls, stride=4).values()) == {0, 1, 2, 3}


@pytest.mark.parametrize("stride", [1, 3, 99])
def test_weights_of_summed_tokens_add_up_to_one(stride):
    plan = make_plan(stride=stride)
    weights = [len(range(TOKENS)[plan.summed(i)]) * plan.calls[i].weight for i in range(24)]
    for b in range(3):
        assert sum(w for i, w in enumerate(weights) if BIN_OF[i] == b) == pytest.approx(1 / 3)


def test_a_stride_of_one_sums_every_token():
    plan = make_plan(stride=1)
    assert all(plan.summed(i) == slice(0, None, 1) for i in range(len(CALLS)))


def test_a_bin_without_a_step_is_refused():
    with pytest.raises(UserError) as caught:
        make_plan(Bins((1000.0, 990.0, 0.0)))
    assert str(caught.value).startswith(
        "bins: no recorded calibration step has t in bin 0, (990, 1000]; use fewer or wider bins"
    )


def test_a_split_without_calls_is_refused():
    calls = [call for call in CALLS if call.split != "heldout"]
    with pytest.raises(UserError, match="trajectories: no call of split 'heldout'"):
        plan_sampling(calls, None, TOKENS, SAMPLES, 0, stride=1)
    with pytest.raises(UserError, match="bins: no recorded heldout step has t in bin 0"):
        plan_sampling(calls, BINS, TOKENS, SAMPLES, 0, stride=1)
