import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.errors import UserError
from stepquant.models.denoiser import Denoiser, block_inputs
from stepquant.models.sites import WAN_SITES
from tests.wan import BLOCKS, load_expert, random_calls, save_expert

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_expert(tmp_path_factory.mktemp("expert"), torch.float32)


@torch.no_grad()
def blocks_seen(model, calls):
    """The arguments of every block and its output, while diffusers runs the whole model."""
    seen = []
    handles = [
        block.register_forward_hook(lambda module, args, output: seen.append((args, output))) for block in model.blocks
    ]
    model(**calls)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_prologue_and_blocks_compute_what_diffusers_computes(folder, dtype):
    """Bit for bit, also in bfloat16, where diffusers keeps norms, modulation and time embedding in float32."""
    calls = random_calls(3, dtype)
    seen = blocks_seen(load_expert(folder, dtype), calls)
    denoiser = Denoiser(folder, "cpu", dtype)
    assert len(seen) == BLOCKS
    inputs = block_inputs(denoiser.prologue(), **calls)
    hidden_states, text, timestep_proj, rotary = seen[0][0][:4]
    assert inputs.hidden_states.shape == (3, 2 * 2 * 3, 64) and inputs.hidden_states.dtype == dtype
    for ours, theirs in (
        (inputs.hidden_states, hidden_states),
        (inputs.encoder_hidden_states, text),
        (inputs.timestep_proj, timestep_proj),
        (inputs.rotary_emb[0], rotary[0]),
        (inputs.rotary_emb[1], rotary[1]),
    ):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    for index, (_, output) in enumerate(seen):
        hidden = denoiser.block(index)(
            inputs.hidden_states, inputs.encoder_hidden_states, inputs.timestep_proj, inputs.rotary_emb
        )
        assert hidden.dtype == output.dtype and torch.equal(hidden, output)
        inputs = inputs.with_hidden_states(hidden)


def test_parameters_have_the_values_and_dtypes_of_diffusers(folder, dtype):
    model, denoiser = load_expert(folder, dtype), Denoiser(folder, "cpu", dtype)
    block = dict(denoiser.block(1).named_parameters())
    for name, parameter in model.blocks[1].named_parameters():
        assert block[name].dtype == parameter.dtype and torch.equal(block[name], parameter)
    assert not any(parameter.is_meta for parameter in denoiser.prologue().parameters())


def test_linear_weight_is_the_stored_weight_in_float32(folder):
    stored = load_file(folder / WEIGHTS)
    denoiser = Denoiser(folder, "cpu", torch.bfloat16)
    for site in WAN_SITES:
        for linear in site.linears:
            assert torch.equal(denoiser.linear_weight(1, linear), stored[f"blocks.1.{linear}.weight"])


def test_the_sites_name_every_linear_of_a_block(folder):
    found = {
        name
        for name, module in Denoiser(folder, "cpu", torch.float32).block(0).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert found == {linear for site in WAN_SITES for linear in site.linears}


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of the expert whose tensors a function may change."""

    def change(function):
        tensors = load_file(folder / WEIGHTS)
        function(tensors)
        save_file(tensors, tmp_path / WEIGHTS)
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        return Denoiser(tmp_path, "cpu", torch.float32)

    return change


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor_of_a_block(changed, tmp_path):
    denoiser = changed(lambda tensors: tensors.pop("blocks.1.attn1.to_q.weight"))
    assert (
        refusal(denoiser.block, 1)
        == f"{tmp_path}: the checkpoint lacks attn1.to_q.weight; expected the weights of WanTransformer3DModel"
    )
    assert denoiser.block(0).attn1.to_q.weight.shape == (64, 64)


def test_a_missing_tensor_before_the_blocks(changed):
    assert "the checkpoint lacks patch_embedding.weight" in refusal(
        changed(lambda tensors: tensors.pop("patch_embedding.weight")).prologue
    )


def test_an_unexpected_tensor(changed):
    denoiser = changed(
        lambda tensors: tensors.update({"blocks.0.extra.weight": torch.zeros(2), "more": torch.zeros(2)})
    )
    assert "has an unknown tensor extra.weight" in refusal(denoiser.block, 0)
    assert "has an unknown tensor more" in refusal(denoiser.prologue)


def test_a_tensor_of_another_shape(changed, tmp_path):
    message = refusal(
        changed(lambda tensors: tensors.update({"blocks.0.attn1.to_q.weight": torch.zeros(64, 32)})).block, 0
    )
    assert message.startswith(f"{tmp_path}: weights do not fit config.json: size mismatch for attn1.to_q.weight")


def test_fewer_blocks_than_the_config_says(folder, changed, tmp_path):
    denoiser = changed(lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("blocks.1.")])
    assert "the checkpoint lacks " in refusal(denoiser.block, 1)


def test_pickled_weights_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    assert "found only pickled weights (diffusion_pytorch_model.bin)" in refusal(
        Denoiser, tmp_path, "cpu", torch.float32
    )
