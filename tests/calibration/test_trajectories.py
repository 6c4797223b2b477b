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


def sample(experts, inputs, branches=2):
    """Call the experts as WanImageToVideoPipeline does: per step, first with the prompt, then without."""
    latents, condition, embeddings = inputs
    for step, (t, name) in enumerate(zip(TIMES, EXPERTS)):
        for branch in range(branches):
            hidden_states = torch.cat([latents[step], condition])[None]
            experts[name](
                hidden_states=hidden_states,
                timestep=torch.tensor([t]),
                encoder_hidden_states=embeddings[branch : branch + 1],
                attention_kwargs=None,
                return_dict=False,
            )
            hidden_states.zero_()  # what the pipeline does with its tensors later must not change what was recorded


def store(root, **prompts):
    """Write prompts (id -> (seed, split, branches)) as the stage lays them out."""
    experts = {"high_noise": FakeDenoiser(), "low_noise": FakeDenoiser()}
    for name, (seed, split, branches) in prompts.items():
        with recorded(experts) as calls:
            sample(experts, make_inputs(seed), branches)
        write_trajectory(root / name, calls, LATENT_CHANNELS, split, name)
    (root / "zarr.json").write_text(group_metadata({"prompts": {name: f"digest of {name}" for name in prompts}}))
    return Trajectories(root)


def test_recorded_keeps_what_each_expert_got_while_the_block_lasts():
    experts = {"high_noise": FakeDenoiser(), "low_noise": FakeDenoiser()}
    inputs = make_inputs(0)
    with recorded(experts) as calls:
        sample(experts, inputs)
    sample(experts, inputs)
    assert [call["expert"] for call in calls] == [name for name in EXPERTS for _ in range(2)]
    assert [call["timestep"].item() for call in calls] == [t for t in TIMES for _ in range(2)]
    assert torch.equal(calls[3]["hidden_states"][0], torch.cat([inputs[0][1], inputs[1]]))
    assert torch.equal(calls[3]["encoder_hidden_states"][0], inputs[2][1])


def test_recorded_lets_go_when_sampling_fails():
    denoiser = FakeDenoiser()
    with pytest.raises(RuntimeError, match="sampling"), recorded({"denoiser": denoiser}):
        raise RuntimeError("sampling failed")
    assert not denoiser._forward_pre_hooks


def test_what_was_recorded_is_what_a_replay_gets(tmp_path):
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


def test_replayed_steps_are_spread_over_each_bin_of_each_prompt():
    """Five steps in the first bin, two in the second. Two of five: the middles of two halves, 5 // 4 = 1 and 15 // 4 = 3; one: the middle."""
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


def test_what_repeats_is_stored_once(tmp_path):
    """4 steps of 3 x 2 x 4 x 4 latents, one 5 x 2 x 4 x 4 condition, two 6 x 8 embeddings, all bfloat16; 4 float32 times."""
    store(tmp_path, dog=(1, "calibration", 2))
    chunks = [path for path in (tmp_path / "dog").rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert sum(path.stat().st_size for path in chunks) == 2 * (4 * 96 + 160 + 96) + 4 * 4


@pytest.mark.parametrize(("key", "what"), [("hidden_states", "latents"), ("encoder_hidden_states", "embeddings")])
def test_a_pipeline_that_produces_nan_is_refused_before_anything_is_written(tmp_path, key, what):
    denoiser = FakeDenoiser()
    experts = {"high_noise": denoiser, "low_noise": denoiser}
    with recorded(experts) as calls:
        sample(experts, make_inputs(0))
    calls[0][key][0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=f"prompt dog: the pipeline gave its denoiser {what} with NaN or Inf"):
        write_trajectory(tmp_path / "dog", calls, LATENT_CHANNELS, "calibration", "prompt dog")
    assert not (tmp_path / "dog").exists()


def test_trajectories_without_one_of_their_prompts_are_refused(tmp_path):
    store(tmp_path, dog=(1, "calibration", 2))
    write_group(tmp_path / "other", {}, {})
    (tmp_path / "zarr.json").write_text(group_metadata({"prompts": {"dog": "", "gone": ""}}))
    with pytest.raises(UserError, match="gone: no such Zarr group"):
        Trajectories(tmp_path)
