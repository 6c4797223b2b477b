import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepquant.errors import UserError
from stepquant.models.block_inputs import BlockInputs, KeptInputs
from stepquant.models.denoiser import Denoiser
from tests.wan import BLOCKS, SITES, load_expert, random_calls, save_expert

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_expert(tmp_path_factory.mktemp("expert"), torch.float32)


@torch.no_grad()
def block_calls(model, calls):
    """The arguments of every block and its output, while diffusers runs the whole model."""
    made = []
    handles = [
        block.register_forward_hook(lambda module, args, output: made.append((args, output))) for block in model.blocks
    ]
    model(**calls)
    for handle in handles:
        handle.remove()
    return made


@torch.no_grad()
def test_blocks_and_what_is_around_them_compute_what_diffusers_computes(folder, dtype):
    """Bit for bit, also in bfloat16, where diffusers keeps norms, modulation and time embedding in float32."""
    calls = random_calls(3, dtype)
    made = block_calls(load_expert(folder, dtype), calls)
    denoiser = Denoiser(folder, "cpu", dtype)
    assert len(made) == BLOCKS
    inputs = denoiser.glue().inputs(calls)
    hidden_states, text, timestep_proj, rotary = made[0][0][:4]
    assert inputs.hidden_states.shape == (3, 2 * 2 * 3, 64) and inputs.hidden_states.dtype == dtype
    assert list(inputs.others) == ["encoder_hidden_states", "temb", "rotary_emb"]
    for ours, theirs in (
        (inputs.hidden_states, hidden_states),
        (inputs.others["encoder_hidden_states"], text),
        (inputs.others["temb"], timestep_proj),
        (inputs.others["rotary_emb"][0], rotary[0]),
        (inputs.others["rotary_emb"][1], rotary[1]),
    ):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    for index, (_, output) in enumerate(made):
        hidden = inputs.run(denoiser.block(index))
        assert hidden.dtype == output.dtype and torch.equal(hidden, output)
        inputs = replace(inputs, hidden_states=hidden)
    expected = load_expert(folder, dtype)(**calls).sample
    assert torch.equal(denoiser.glue().output(calls, hidden), expected)


def test_parameters_have_the_values_and_dtypes_of_diffusers(folder, dtype):
    model, denoiser = load_expert(folder, dtype), Denoiser(folder, "cpu", dtype)
    block = dict(denoiser.block(1).named_parameters())
    for name, parameter in model.blocks[1].named_parameters():
        assert block[name].dtype == parameter.dtype and torch.equal(block[name], parameter)
    assert not any(parameter.is_meta for parameter in denoiser.glue().model.parameters())


def test_linear_weight_is_the_stored_weight_in_float32(folder):
    stored = load_file(folder / WEIGHTS)
    denoiser = Denoiser(folder, "cpu", torch.bfloat16)
    for site in SITES:
        for linear in site.linears:
            assert torch.equal(denoiser.linear_weight(1, linear), stored[f"blocks.1.{linear}.weight"])


def test_weights_are_copied_to_the_device_before_they_are_cast(folder, monkeypatch):
    """A GPU gets the bytes of the stored dtype. Failed before: the cast came first, or in the same step, on the CPU."""
    log = []

    class Stored:
        def to(self, *to):
            log.append(to)
            return self

        def float(self):
            return self.to(torch.float32)

    denoiser = Denoiser(folder, "cuda:1", torch.bfloat16)
    monkeypatch.setattr(denoiser.weights, "get", lambda key: Stored())
    denoiser.linear_weight(1, "attn1.to_q")
    denoiser._tensor("blocks.1.attn1.to_q.weight")
    denoiser._tensor("blocks.1.norm2.weight")
    assert log == [
        ("cuda:1",),
        (torch.float32,),
        ("cuda:1",),
        (torch.bfloat16,),
        ("cuda:1",),
        (torch.float32,),
    ]


def test_equal_arguments_of_chunks_are_kept_once(folder):
    """Rotary embeddings are 34 MB at the size of Wan2.2-I2V-A14B."""
    glue = Denoiser(folder, "cpu", torch.float32).glue()
    first, second = (glue.inputs(random_calls(count, torch.float32)) for count in (3, 2))
    kept = KeptInputs.of(first, None)
    again = KeptInputs.of(second, kept)
    assert all(a is b for a, b in zip(again.others["rotary_emb"], first.others["rotary_emb"]))
    assert again.others["encoder_hidden_states"] is second.others["encoder_hidden_states"]
    assert again.others["temb"] is second.others["temb"]
    other = KeptInputs.of(replace(first, others={**first.others, "rotary_emb": first.others["temb"]}), kept)
    assert other.others["rotary_emb"] is first.others["temb"]


def test_modulation_per_token_is_kept_once_per_value_of_t():
    """2 GB for a call of Wan2.2-TI2V-5B, of which two rows differ; the block gets all of it again."""
    rows = torch.randn(2, 3, 6, 8)
    modulation = rows.repeat_interleave(torch.tensor([4, 1, 15]), 1)
    inputs = BlockInputs(torch.randn(2, 20, 8), "hidden_states", {"temb": modulation, "mask": None})
    kept = KeptInputs.of(inputs, None)
    assert kept.others["temb"].rows.shape == rows.shape
    back = kept.with_hidden_states(inputs.hidden_states)
    assert torch.equal(back.others["temb"], modulation) and back.others["mask"] is None
    assert KeptInputs.of(inputs, kept).others["temb"] is kept.others["temb"]


def test_the_sites_name_every_linear_of_a_block(folder):
    found = {
        name
        for name, module in Denoiser(folder, "cpu", torch.float32).block(0).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert found == {linear for site in SITES for linear in site.linears}


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
        changed(lambda tensors: tensors.pop("patch_embedding.weight")).glue
    )


def test_an_unexpected_tensor(changed):
    denoiser = changed(
        lambda tensors: tensors.update({"blocks.0.extra.weight": torch.zeros(2), "more": torch.zeros(2)})
    )
    assert "has an unknown tensor extra.weight" in refusal(denoiser.block, 0)
    assert "has an unknown tensor more" in refusal(denoiser.glue)


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
