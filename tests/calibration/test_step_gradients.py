"""Gradients through blocks that are loaded one at a time, against autograd through the whole model of diffusers."""

import pytest
import torch

from stepquant.calibration.step_gradients import Probes, StepGradients, denoised
from stepquant.models.denoiser import Denoiser
from stepquant.models.manifest import DenoiserInputs, ExpertManifest, SiteManifest
from stepquant.models.weights import open_weights
from tests.wan import BLOCKS, CHANNELS, SITES, TEXT_DIM, load_expert, random_calls, save_expert

PROBES = Probes(count=2, seed="3/a prompt", guidance=3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_expert(tmp_path_factory.mktemp("expert") / "transformer", torch.float32)


@pytest.fixture(scope="module")
def branches():
    """A step's arguments: the branches differ in the text."""
    calls = random_calls(2, torch.float32)
    guided = {name: value[:1] for name, value in calls.items()}
    return guided, guided | {"encoder_hidden_states": calls["encoder_hidden_states"][1:]}


def described(folder):
    weights = open_weights(folder)
    sites = {
        site.name: SiteManifest(
            depends_on_timestep=site.depends_on_timestep,
            text_alone=site.text_alone,
            linears={linear: weights.shape(f"blocks.0.{linear}.weight") for linear in site.linears},
        )
        for site in SITES
    }
    inputs = DenoiserInputs(in_channels=CHANNELS, out_channels=16, patch_size=(1, 2, 2), text_dim=TEXT_DIM)
    return ExpertManifest(
        subfolder="transformer", t_range=(0, 1000), blocks=BLOCKS, sites=sites, inputs=inputs, bf16_bytes=0
    )


def test_gradients_are_those_of_the_whole_model(folder, branches, tmp_path):
    model = Denoiser(folder, "cpu", torch.float32)
    step = StepGradients(model, model.glue(), described(folder), branches, PROBES, tmp_path)
    expected = [whole_model(folder, given, factor) for given, factor in zip(branches, (3.0, -2.0))]
    for index in reversed(range(BLOCKS)):
        for branch, probe, passes in step.block(index):
            for site in SITES:
                outputs, gradients = expected[branch]
                names = [f"blocks.{index}.{linear}" for linear in site.linears]
                torch.testing.assert_close(passes[site.name].y, torch.cat([outputs[name] for name in names], 1))
                by_linear = torch.cat([gradients[probe][name] for name in names], 1)
                torch.testing.assert_close(passes[site.name].G, by_linear, rtol=1e-3, atol=1e-4)
    assert list(tmp_path.iterdir())  # one block is in memory: the inputs of all blocks are files


def whole_model(folder, arguments, factor):
    """Outputs of all linears [T, N] by name, and for each probe the gradients by them."""
    model = load_expert(folder, torch.float32).requires_grad_(False)
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            outputs[name] = output + torch.zeros_like(output).requires_grad_()
            return outputs[name]

        return hook

    for name, module in model.named_modules():
        if name.startswith("blocks") and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(keep(name))
    result = model(**arguments, return_dict=False)[0]
    gradients = []
    for probe in PROBES.draw(result.shape):
        found = torch.autograd.grad((probe * result).sum() * factor, list(outputs.values()), retain_graph=True)
        gradients.append({name: gradient[0] for name, gradient in zip(outputs, found)})
    return {name: output[0].detach() for name, output in outputs.items()}, gradients


def test_probes_are_signs_that_depend_on_the_seed_alone():
    first, second = PROBES.draw((1, 16, 3, 8, 8))
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(first, PROBES.draw((1, 16, 3, 8, 8))[0])
    other = Probes(1, "3/another prompt", 3.0).draw((1, 16, 3, 8, 8))[0]
    # Independent signs: the mean product of 3,072 pairs has a standard deviation of 0.018.
    assert abs((first * second).mean()) < 0.09 and abs((first * other).mean()) < 0.09


def test_a_single_branch_has_no_guidance():
    assert PROBES.factors(1) == (1.0,) and PROBES.factors(2) == (3.0, -2.0)


def test_a_first_frame_with_t_zero_is_a_condition():
    """Two frames of 4 x 6 latents, patches of 1 x 2 x 2: 6 tokens a frame."""
    t = torch.tensor([[0.0] * 6 + [900.0] * 6])
    expected = torch.stack([torch.zeros(4, 6), torch.ones(4, 6)]).view(1, 1, 2, 4, 6)
    assert torch.equal(denoised(t, (1, 16, 2, 4, 6), (1, 2, 2)), expected)
    assert torch.equal(denoised(torch.tensor([900.0]), (1, 16, 2, 4, 6), (1, 2, 2)), torch.ones(1))
