"""Recorded calls come back exactly, and what repeats is stored once."""

import pytest
import torch

from stepquant.calibration.recorder import RecordedCall, Samples
from stepquant.calibration.trajectories import Call, Trajectories, spread_over_bins, write_trajectory
from stepquant.errors import UserError
from stepquant.models.bins import Bins
from stepquant.models.families import find_denoiser
from stepquant.storage.zarr_groups import group_metadata, write_group

TIMES = [1000.0, 933.5, 900.0, 421.0]
EXPERTS = ["high_noise", "high_noise", "low_noise", "low_noise"]
LATENT_CHANNELS, BLOCKS = 3, 2


def make_inputs(seed):
    """Latents per step, one condition, one embedding per branch."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(TIMES), LATENT_CHANNELS, 2, 4, 4, generator=generator).bfloat16()
    condition = torch.randn(5, 2, 4, 4, generator=generator).bfloat16()
    embeddings = torch.randn(2, 6, 8, generator=generator).bfloat16()
    return latents, condition, embeddings


def make_calls(inputs, branches=2, times=TIMES):
    """The calls of WanImageToVideoPipeline: per step, first with the prompt, then without; samples hold its number."""
    latents, condition, embeddings = inputs
    calls = []
    for step, (t, expert) in enumerate(zip(times, EXPERTS)):
        for branch in range(branches):
            arguments = {
                "hidden_states": torch.cat([latents[step], condition])[None].clone(),
                "timestep": torch.tensor([t]),
                "encoder_hidden_states": embeddings[branch : branch + 1].clone(),
            }
            number = float(len(calls))
            samples = Samples(torch.full((BLOCKS, 6), number), torch.full((4,), number))
            calls.append(RecordedCall(expert, arguments, samples))
    return calls


def write(folder, calls, split="calibration"):
    denoiser = find_denoiser("WanTransformer3DModel")
    write_trajectory(folder, calls, len(TIMES), denoiser, LATENT_CHANNELS, split, f"prompt {folder.name}")


def open_store(root, **prompts):
    """Write the calls of prompts (id -> (calls, split)) as the stage does."""
    for name, (calls, split) in prompts.items():
        write(root / name, calls, split)
    (root / "zarr.json").write_text(group_metadata({"prompts": {name: f"digest of {name}" for name in prompts}}))
    return Trajectories(root)


def exact(trajectories, prompt, calls):
    """Whether every call of a prompt comes back as it was recorded."""
    found = {name: trajectories.calls(name) for name in dict.fromkeys(EXPERTS)}
    back = [call for name in found for call in found[name] if call.prompt == prompt]
    assert len(back) == len(calls)
    for call in back:
        recorded = calls[trajectories.number(call)]
        arguments = trajectories.inputs([call])
        assert arguments.keys() == recorded.arguments.keys()
        for name, tensor in recorded.arguments.items():
            assert arguments[name].dtype == tensor.dtype and torch.equal(arguments[name], tensor), name
    return True


def test_replay_gets_the_inputs_that_were_recorded(tmp_path):
    dog, cat = make_calls(make_inputs(1)), make_calls(make_inputs(2))
    trajectories = open_store(tmp_path, dog=(dog, "calibration"), cat=(cat, "heldout"))
    assert trajectories.digest() == {"dog": "digest of dog", "cat": "digest of cat"}
    assert trajectories.calls("low_noise") == [
        Call(prompt, split, step, branch, TIMES[step])
        for prompt, split in (("cat", "heldout"), ("dog", "calibration"))
        for step in (2, 3)
        for branch in (0, 1)
    ]
    assert [call.step for call in trajectories.calls("high_noise")] == [0, 0, 1, 1] * 2
    assert exact(trajectories, "dog", dog) and exact(trajectories, "cat", cat)
    calls = [Call("cat", "heldout", 1, 1, 933.5), Call("dog", "calibration", 3, 0, 421.0)]
    together = trajectories.inputs(calls)
    for row, (made, number) in enumerate(((cat, 3), (dog, 6))):
        for name, tensor in made[number].arguments.items():
            assert torch.equal(together[name][row : row + 1], tensor)


def test_samples_are_those_of_the_call(tmp_path):
    trajectories = open_store(tmp_path, dog=(make_calls(make_inputs(1)), "calibration"))
    for expert in ("high_noise", "low_noise"):
        for call in trajectories.calls(expert):
            samples = trajectories.samples(call, BLOCKS)
            assert samples.blocks.shape == (BLOCKS, 6) and samples.output.shape == (4,)
            assert samples.blocks.unique().item() == samples.output.unique().item() == 2 * call.step + call.branch
    with pytest.raises(UserError, match="prompt dog was not recorded with 5 blocks of high_noise"):
        trajectories.samples(trajectories.calls("high_noise")[0], 5)


def test_made_up_calls_have_no_samples(tmp_path):
    calls = [RecordedCall(call.expert, call.arguments, None) for call in make_calls(make_inputs(1))]
    trajectories = open_store(tmp_path, dog=(calls, "calibration"))
    assert trajectories.samples(trajectories.calls("high_noise")[0], BLOCKS) is None


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("times", [[999.0, 999.0, 900.0, 421.0], [999.0, 900.0, 900.0, 900.0]])
def test_steps_with_the_same_t_are_told_apart(tmp_path, branches, times):
    """As UniPC's integer timesteps at a high shift: 999, 999 with shift 12 and 100 steps."""
    calls = make_calls(make_inputs(1), branches, times)
    trajectories = open_store(tmp_path, dog=(calls, "calibration"))
    found = trajectories.calls("high_noise") + trajectories.calls("low_noise")
    expected = [(step, branch, times[step]) for step in range(4) for branch in range(branches)]
    assert [(call.step, call.branch, call.t) for call in found] == expected
    assert exact(trajectories, "dog", calls)


def test_t_of_a_call_is_the_largest_over_its_tokens(tmp_path):
    """As in Wan2.2-TI2V-5B, where the tokens of the first frame are given t = 0."""
    calls = make_calls(make_inputs(1))
    for call in calls:
        t = call.arguments["timestep"].item()
        call.arguments["timestep"] = torch.tensor([[0.0, 0.0, t, t]])
    trajectories = open_store(tmp_path, dog=(calls, "calibration"))
    assert [call.t for call in trajectories.calls("low_noise")] == [900.0, 900.0, 421.0, 421.0]
    assert exact(trajectories, "dog", calls)


@pytest.mark.parametrize("count", [7, 0])
def test_guidance_in_some_steps_only_is_refused(tmp_path, count):
    with pytest.raises(UserError) as caught:
        write(tmp_path / "dog", make_calls(make_inputs(0))[:count])
    assert str(caught.value).startswith(
        f"prompt dog: the pipeline called its denoisers {count} times in 4 steps; allowed: the same number of calls in "
        "every step, 1 without and 2 with guidance"
    )
    assert not (tmp_path / "dog").exists()


LATENTS, CONDITION, TEXT = "hidden_states", "hidden_states.condition", "encoder_hidden_states"
AS_USUAL = {LATENTS: "step", CONDITION: "prompt", "timestep": "step", TEXT: "branch"}


@pytest.mark.parametrize(
    ("name", "call", "offset", "per"),
    [
        ("hidden_states", 3, 0, {LATENTS: "call"}),  # latents that differ between the branches of a step
        ("hidden_states", 6, -1, {CONDITION: "call"}),  # a condition that differs in one call
        ("encoder_hidden_states", 5, 0, {TEXT: "call"}),
        ("timestep", 1, 0, {"timestep": "call"}),
    ],
)
def test_what_does_not_repeat_is_stored_for_every_call(tmp_path, name, call, offset, per):
    """Whatever a pipeline changes between calls comes back; nothing relies on a fixed list of what stays the same."""
    calls = make_calls(make_inputs(0))
    calls[call].arguments[name].view(-1)[offset] += 1
    trajectories = open_store(tmp_path, dog=(calls, "calibration"))
    assert trajectories._groups["dog"].attrs["per"] == AS_USUAL | per
    assert exact(trajectories, "dog", calls)


def test_experts_that_take_turns_within_a_step(tmp_path):
    calls = make_calls(make_inputs(0))
    calls[1] = RecordedCall("low_noise", calls[1].arguments, calls[1].samples)
    trajectories = open_store(tmp_path, dog=(calls, "calibration"))
    assert [(call.step, call.branch) for call in trajectories.calls("high_noise")] == [(0, 0), (1, 0), (1, 1)]
    assert [trajectories.samples(call, BLOCKS).output[0].item() for call in trajectories.calls("low_noise")] == [
        1,
        4,
        5,
        6,
        7,
    ]


@pytest.mark.parametrize(
    ("levels", "copies", "per"),
    [((0, 0, 0, 0), 1, "prompt"), ((0, 1, 0, 1), 2, "branch"), ((0, 0, 1, 1), 4, "step"), ((0, 1, 2, 3), 8, "call")],
)
def test_any_other_argument_is_stored_the_fewest_times(tmp_path, levels, copies, per):
    """An image embedding, a mask, a hint: the leading size need not be the batch (FLF2V passes two rows per call)."""
    calls = make_calls(make_inputs(0))
    for number, call in enumerate(calls):
        call.arguments["hint"] = torch.full((2, 3), levels[number % 4], dtype=torch.int64) + 10 * (
            number // 4 if per in ("step", "call") else 0
        )
    trajectories = open_store(tmp_path, dog=(calls, "calibration"))
    group = trajectories._groups["dog"]
    assert group.attrs["per"]["hint"] == per and group["hint"].shape == (copies, 2, 3)
    assert exact(trajectories, "dog", calls)
    assert trajectories.inputs(trajectories.calls("high_noise"))["hint"].shape == (8, 3)


def change_shape(calls):
    calls[3].arguments["encoder_hidden_states"] = torch.zeros(1, 7, 8).bfloat16()


def change_dtype(calls):
    calls[3].arguments["timestep"] = calls[3].arguments["timestep"].double()


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (change_shape, "call 4 has another encoder_hidden_states than call 1"),
        (change_dtype, "call 4 has another timestep than call 1"),
        (lambda calls: calls[5].arguments.pop("timestep"), "call 6 has another timestep than call 1, None and"),
        (lambda calls: calls[2].arguments.update(hint=torch.zeros(1)), "call 3 has another hint than call 1"),
        (
            lambda calls: [call.arguments.update(hidden_states=torch.zeros(2, 8, 2, 4, 4)) for call in calls],
            "the pipeline calls its denoiser with a batch of 2; allowed: 1",
        ),
    ],
)
def test_calls_that_cannot_be_stored(tmp_path, changed, what):
    calls = make_calls(make_inputs(0))
    changed(calls)
    with pytest.raises(UserError) as caught:
        write(tmp_path / "dog", calls)
    assert str(caught.value).startswith(f"prompt dog: {what}")
    assert not (tmp_path / "dog").exists()


def test_prompts_with_other_arguments_do_not_make_one_batch(tmp_path):
    dog, cat = make_calls(make_inputs(1)), make_calls(make_inputs(2))
    for call in cat:
        call.arguments["hint"] = torch.zeros(1, 2)
    trajectories = open_store(tmp_path, dog=(dog, "calibration"), cat=(cat, "heldout"))
    with pytest.raises(UserError, match="prompts cat and dog give the denoiser arguments"):
        trajectories.inputs(trajectories.calls("high_noise"))


def test_without_condition_channels_there_is_no_condition(tmp_path):
    calls = make_calls(make_inputs(1))
    for call in calls:
        call.arguments["hidden_states"] = call.arguments["hidden_states"][:, :LATENT_CHANNELS]
    trajectories = open_store(tmp_path, dog=(calls, "calibration"))
    assert CONDITION not in trajectories._groups["dog"].attrs["per"]
    assert exact(trajectories, "dog", calls)


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
    calls = open_store(tmp_path, dog=(make_calls(make_inputs(1), 1), "calibration")).calls("high_noise")
    assert [(call.step, call.branch) for call in calls] == [(0, 0), (1, 0)]


def test_repeated_inputs_are_stored_once(tmp_path):
    """bfloat16: 4 x 3 x 2 x 4 x 4 latents, one 5 x 2 x 4 x 4 condition, two 6 x 8 embeddings. float32: 4 timesteps, t
    of 8 calls; samples of 8 calls are 2 x 6 and 4 values."""
    write(tmp_path / "dog", make_calls(make_inputs(1)))
    sizes = {path.name: 0 for path in (tmp_path / "dog").iterdir()}
    for path in (tmp_path / "dog").rglob("c/**/*"):
        if path.is_file():
            sizes[path.relative_to(tmp_path / "dog").parts[0]] += path.stat().st_size
    samples = sum(sizes.pop(name) for name in list(sizes) if name.startswith("samples."))
    assert sum(sizes.values()) == 2 * (4 * 96 + 160 + 96) + 4 * 4 + 8 * 4
    index = 4 * (4 * 16 + 4)  # of a file with four parts: two numbers of 8 bytes each, and a checksum
    assert samples == 8 * 4 * (2 * 6 + 4) + index


@pytest.mark.parametrize("name", ["hidden_states", "encoder_hidden_states"])
def test_a_pipeline_that_produces_nan_is_refused_before_anything_is_written(tmp_path, name):
    calls = make_calls(make_inputs(0))
    calls[0].arguments[name][0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=f"prompt dog: the pipeline gave its denoiser {name} with NaN or Inf"):
        write(tmp_path / "dog", calls)
    assert not (tmp_path / "dog").exists()


def test_a_denoiser_that_computes_nan_in_its_last_call_is_refused(tmp_path):
    calls = make_calls(make_inputs(0))
    calls[-1].samples.output[0] = float("inf")
    with pytest.raises(UserError, match="prompt dog: a denoiser computed NaN or Inf"):
        write(tmp_path / "dog", calls)
    assert not (tmp_path / "dog").exists()


def test_trajectories_without_one_of_their_prompts_are_refused(tmp_path):
    open_store(tmp_path, dog=(make_calls(make_inputs(1)), "calibration"))
    write_group(tmp_path / "other", {}, {})
    (tmp_path / "zarr.json").write_text(group_metadata({"prompts": {"dog": "", "gone": ""}}))
    with pytest.raises(UserError, match="gone: no such Zarr group"):
        Trajectories(tmp_path)
    (tmp_path / "zarr.json").write_text(group_metadata({"prompts": {"other": ""}}))
    with pytest.raises(UserError, match="not the trajectories of this version; run stage trajectories again"):
        Trajectories(tmp_path)
