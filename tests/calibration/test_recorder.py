"""What is recorded of a denoiser's calls: every tensor that it is given, and samples of what it computes."""

import pytest
import torch
from diffusers import WanVACETransformer3DModel

from benchmarks.tiny_pipelines import TINY_PIPELINES, random_denoiser
from stepquant.calibration.recorder import block_places, output_places, recorded
from stepquant.errors import UserError

TINY = TINY_PIPELINES["Wan2.1-I2V"]


@pytest.fixture(scope="module")
def denoiser():
    return random_denoiser(TINY, blocks=2, seed=0)


def arguments(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 36, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([500.0 + seed]),
        "encoder_hidden_states": torch.randn(1, 512, 128, generator=generator),
        "encoder_hidden_states_image": torch.randn(1, 5, 32, generator=generator),
    }


@torch.no_grad()
def test_every_tensor_is_recorded_under_its_name_however_it_is_passed(denoiser):
    given = arguments()
    with recorded({"denoiser": denoiser}) as calls:
        denoiser(**given, attention_kwargs=None, return_dict=False)
        denoiser(*given.values())
        for tensor in given.values():
            tensor.zero_()  # the pipeline may change its tensors later: recorded ones must not follow
    denoiser(**given)
    assert len(calls) == 2 and not denoiser._forward_pre_hooks and not denoiser._forward_hooks
    for call in calls:
        assert call.expert == "denoiser" and call.arguments.keys() == given.keys()
        assert all(torch.equal(call.arguments[name], tensor) for name, tensor in arguments().items())


@torch.no_grad()
def test_samples_are_values_of_every_block_and_of_the_output(denoiser):
    outputs = []
    handles = [block.register_forward_hook(lambda m, a, output: outputs.append(output)) for block in denoiser.blocks]
    with recorded({"denoiser": denoiser}) as calls:
        for number in range(2):
            outputs.clear()
            output = denoiser(**arguments(number), return_dict=False)[0]
            samples = calls[number].samples
            for block in range(2):
                assert torch.equal(samples.blocks[block], outputs[block][0].flatten()[block_places(number, 32, 64)])
            assert torch.equal(samples.output, output[0].flatten()[output_places(number, 2048)])
    for handle in handles:
        handle.remove()
    # 32 tokens of 64 channels, of which 16 x 64 are taken; an output of 16 x 2 x 8 x 8 is taken whole.
    assert samples.blocks.shape == (2, 16 * 64) and samples.output.shape == (2048,)
    assert torch.isin(samples.blocks[1], outputs[1]).all()
    assert torch.equal(samples.output.sort().values, output.flatten().sort().values)


def test_other_places_are_taken_in_every_call():
    taken = [block_places(call, 1000, 128) for call in range(3)]
    for places in taken:
        assert len(places.unique()) == 16 * 64 and len((places // 128).unique()) == 16
        assert len((places % 128).unique()) == 64
    assert len({tuple(places.tolist()) for places in taken}) == 3
    assert torch.equal(block_places(1, 1000, 128), taken[1])


@pytest.mark.parametrize(
    ("extra", "shown"),
    [
        ({"attention_kwargs": {"scale": 0.5}}, "attention_kwargs = dict of scale"),
        ({"attention_kwargs": {"hint": torch.zeros(2)}}, "attention_kwargs = dict of hint"),
        ({"encoder_hidden_states_image": [torch.zeros(1, 5, 32)]}, "encoder_hidden_states_image = ["),
    ],
)
def test_what_is_no_tensor_and_changes_something_is_refused(denoiser, extra, shown):
    with recorded({"low_noise": denoiser}), pytest.raises(UserError) as caught:
        denoiser(**arguments() | extra)
    message = str(caught.value)
    assert message.startswith(f"low_noise: the pipeline passes its denoiser {shown}")
    assert message.endswith("which cannot be recorded; allowed: tensors")


def test_another_denoiser_class_is_refused():
    with torch.device("meta"):
        model = WanVACETransformer3DModel(num_layers=1, vace_layers=[0], num_attention_heads=1, attention_head_dim=12)
    with pytest.raises(UserError, match="'WanVACETransformer3DModel' is not supported"), recorded({"denoiser": model}):
        pass


def test_hooks_are_removed_if_sampling_fails(denoiser):
    with pytest.raises(RuntimeError, match="sampling"), recorded({"denoiser": denoiser}):
        raise RuntimeError("sampling failed")
    assert not denoiser._forward_pre_hooks
    assert not any(block._forward_hooks for block in denoiser.blocks)
