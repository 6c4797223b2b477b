import pytest
import torch
from torch import nn

from stepquant.calibration.trajectories import Call, Trajectories, recorded, spread_over_bins, write_trajectory
from stepquant.errors import UserError
from stepquant.models.bins import Bins
from stepquant.storage.zarr_groups import group_metadata, write_group

TIMES = [1000.0, 933.5, 900.0, 421.0]
EXPERTS = ["high_noise", "high_noise", "low_noise", "low_noise"]
LATENT_CHANNELS = 3


class FakeDenoiser(nn.Module):
    def forward(self, hidden_states, timestep, encoder_hidden_states, attention_kwargs=None, return_dict=True):
        return hidden_states * 2


def make_inputs(seed):
    """Latents per step, one condition, one embedding per branch."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(TIMES), LATENT_CHANNELS, 2, 4, 4, generator=generator).bfloat16()
    condition = torch.randn(5, 2, 4, 4, generator=generator).bfloat16()
    embeddings = torch.randn(2, 6, 8, generator=generator).bfloat16()
    return latents, condition, embeddings


def sample(experts, inputs, branches=(2, 2, 2, 2), times=TIMES):
    """Call the experts as WanImageToVideoPipeline does: per step, first with the prompt, then without."""
    latents, condition, embeddings = inputs
    for step, (t, name) in enumerate(zip(times, EXPERTS)):
        for branch in range(branches[step]):
            hidden_states = torch.cat([latents[step], condition])[None]
            experts[name](
                hidden_states=hidden_states,
                timestep=torch.tensor([t]),
                encoder_hidden_states=embeddings[branch : branch + 1],
                attention_kwargs=None,
                return_dict=False,
            )
            hidden_states.zero_()  # the pipeline may change its tensors later: recorded ones must not follow


def record(inputs, branches=2, times=TIMES):
    """The recorded calls of one sampling run; branches: per step, or of every step."""
    experts = {"high_noise": FakeDenoiser(), "low_noise": FakeDenoiser()}
    with recorded(experts) as calls:
        sample(experts, inputs, [branches] * 4 if isinstance(branches, int) else branches, times)
    return calls


def write(folder, calls, split="calibration"):
    write_trajectory(folder, calls, len(TIMES), LATENT_CHANNELS, split, f"prompt {folder.name}")


def store(root, times=TIMES, **prompts):
    """Write prompts (id -> (seed, split, branches)) as the stage does."""
    for name, (seed, split, branches) in prompts.items():
        write(root / name, record(make_inputs(seed), branches, times), split)
    (root / "zarr.json").write_text(group_metadata({"prompts": {name: f"digest of {name}" for name in prompts}}))
    return Trajectories(root)


def test_calls_are_recorded_inside_the_with_block_only():
    experts = {"high_noise": FakeDenoiser(), "low_noise": FakeDenoiser()}
    inputs = make_inputs(0)
    with recorded(experts) as calls:
        sample(experts, inputs)
    sample(experts, inputs)
    assert [call["expert"] for call in calls] == [name for name in EXPERTS for _ in range(2)]
    assert [call["timestep"].item() for call in calls] == [t for t in TIMES for _ in range(2)]
    assert torch.equal(calls[3]["hidden_states"][0], torch.cat([inputs[0][1], inputs[1]]))
    assert torch.equal(calls[3]["encoder_hidden_states"][0], inputs[2][1])


def test_hooks_are_removed_if_sampling_fails():
    denoiser = FakeDenoiser()
    with pytest.raises(RuntimeError, match="sampling"), recorded({"denoiser": denoiser}):
        raise RuntimeError("sampling failed")
    assert not denoiser._forward_pre_hooks


def test_replay_gets_the_inputs_that_were_recorded(tmp_path):
    trajectories = store(tmp_path, dog=(1, "calibration", 2), cat=(2, "heldout", 2))
    assert trajectories.digest() == {"dog": "digest of dog", "cat": "digest of cat"}
    assert trajectories.calls("low_noise") == [
        Call(prompt, split, step, branch, TIMES[step])
        for prompt, split in (("cat", "heldout"), ("dog", "calibration"))
        for step in (2, 3)
        for branch in (0, 1)
    ]
    assert [call.step for call in trajectories.calls("high_noise")] == [0, 0, 1, 1] * 2
    calls = [Call("cat", "heldout", 1, 1, 933.5), Call("dog", "calibration", 3, 0, 421.0)]
    hidden, timestep, text = trajectories.inputs(calls)
    for row, (seed, step, branch) in enumerate(((2, 1, 1), (1, 3, 0))):
        latents, condition, embeddings = make_inputs(seed)
        assert torch.equal(hidden[row], torch.cat([latents[step], condition]))
        assert torch.equal(text[row], embeddings[branch])
    assert hidden.dtype == text.dtype == torch.bfloat16
    assert timestep.tolist() == [933.5, 421.0]


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("times", [[999.0, 999.0, 900.0, 421.0], [999.0, 900.0, 900.0, 900.0]])
def test_steps_with_the_same_t_are_told_apart(tmp_path, branches, times):
    """As UniPC's integer timesteps at a high shift: 999, 999 with shift 12 and 100 steps."""
    trajectories = store(tmp_path, times, dog=(1, "calibration", branches))
    found = trajectories.calls("high_noise") + trajectories.calls("low_noise")
    expected = [(step, branch, times[step]) for step in range(4) for branch in range(branches)]
    assert [(call.step, call.branch, call.t) for call in found] == expected
    latents, condition, embeddings = make_inputs(1)
    hidden, _, text = trajectories.inputs(found)
    for row, call in enumerate(found):
        assert torch.equal(hidden[row], torch.cat([latents[call.step], condition]))
        assert torch.equal(text[row], embeddings[call.branch])


@pytest.mark.parametrize(("branches", "calls"), [((1, 1, 2, 2), 6), ((2, 2, 2, 1), 7), ((0, 0, 0, 0), 0)])
def test_guidance_in_some_steps_only_is_refused(tmp_path, branches, calls):
    with pytest.raises(UserError) as caught:
        write(tmp_path / "dog", record(make_inputs(0), branches))
    assert str(caught.value).startswith(
        f"prompt dog: the pipeline called its denoisers {calls} times in 4 steps; allowed: the same number of calls in "
        "every step, 1 without and 2 with guidance"
    )
    assert not (tmp_path / "dog").exists()


def change(key, call, offset):
    """A function that changes one value of one call's input."""

    def apply(calls):
        calls[call][key].view(-1)[offset] += 1

    return apply


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        (change("hidden_states", 3, 0), "call 2 of step 2"),  # latents that differ between the branches
        (change("hidden_states", 6, -1), "call 1 of step 4"),  # a condition that differs between steps
        (change("encoder_hidden_states", 5, 0), "call 2 of step 3"),
        (change("timestep", 1, 0), "call 2 of step 1"),
        (lambda calls: calls[1].update(expert="low_noise"), "call 2 of step 1"),
        (lambda calls: calls.insert(1, calls.pop(2)), "call 2 of step 1"),
    ],
)
def test_inputs_that_are_stored_once_must_be_the_same_in_every_call(tmp_path, changed, place):
    calls = record(make_inputs(0))
    changed(calls)
    with pytest.raises(UserError, match=f"prompt dog: {place} does not fit the others; allowed: 2 calls per step"):
        write(tmp_path / "dog", calls)
    assert not (tmp_path / "dog").exists()


def test_replayed_steps_are_spread_over_each_bin_of_each_prompt():
    """Five steps in the first bin, two in the second.

    Two of five are the middles of two halves, 5 // 4 = 1 and 15 // 4 = 3; one of five is the middle.
    """
    times = [990, 980, 970, 960, 950, 400, 200]
    calls = [
        Call(prompt, "calibration", step, branch, t)
        for prompt in ("cat", "dog")
        for step, t in enumerate(times)
        for branch in (0, 1)
    ]
    bins = Bins((1000, 900, 0))

    def kept(steps):
        return [(call.prompt, call.step, call.branch) for call in spread_over_bins(calls, bins, steps)]

    assert kept(2) == [
        (prompt, step, branch) for prompt in ("cat", "dog") for step in (1, 3, 5, 6) for branch in (0, 1)
    ]
    assert kept(1) == [(prompt, step, branch) for prompt in ("cat", "dog") for step in (2, 6) for branch in (0, 1)]
    assert kept(None) == kept(9) == [(call.prompt, call.step, call.branch) for call in calls]


def test_without_guidance_there_is_one_branch(tmp_path):
    calls = store(tmp_path, dog=(1, "calibration", 1)).calls("high_noise")
    assert [(call.step, call.branch) for call in calls] == [(0, 0), (1, 0)]


def test_repeated_inputs_are_stored_once(tmp_path):
    """bfloat16: 4 x 3 x 2 x 4 x 4 latents, one 5 x 2 x 4 x 4 condition, two 6 x 8 embeddings. float32: 4 times."""
    store(tmp_path, dog=(1, "calibration", 2))
    chunks = [path for path in (tmp_path / "dog").rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert sum(path.stat().st_size for path in chunks) == 2 * (4 * 96 + 160 + 96) + 4 * 4


@pytest.mark.parametrize(("key", "what"), [("hidden_states", "latents"), ("encoder_hidden_states", "embeddings")])
def test_a_pipeline_that_produces_nan_is_refused_before_anything_is_written(tmp_path, key, what):
    calls = record(make_inputs(0))
    calls[0][key][0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=f"prompt dog: the pipeline gave its denoiser {what} with NaN or Inf"):
        write(tmp_path / "dog", calls)
    assert not (tmp_path / "dog").exists()


def test_trajectories_without_one_of_their_prompts_are_refused(tmp_path):
    store(tmp_path, dog=(1, "calibration", 2))
    write_group(tmp_path / "other", {}, {})
    (tmp_path / "zarr.json").write_text(group_metadata({"prompts": {"dog": "", "gone": ""}}))
    with pytest.raises(UserError, match="gone: no such Zarr group"):
        Trajectories(tmp_path)
