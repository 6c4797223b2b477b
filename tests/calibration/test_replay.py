from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stepquant.calibration import replay
from stepquant.calibration.replay import BlockObservers, replay_block, site_inputs
from stepquant.models.denoiser import Denoiser
from tests.wan import BLOCKS, SITES, load_expert, random_calls, save_expert

COUNT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_expert(tmp_path_factory.mktemp("expert"), torch.float32)


def batches(inputs, size):
    """Prepare (positions, BlockInputs) per batch; inputs is a function of a slice of the calls."""
    for start in range(0, COUNT, size):
        positions = range(start, min(start + size, COUNT))
        yield positions, inputs(slice(positions.start, positions.stop))


@torch.no_grad()
def whole_model(folder, calls):
    """Every block's output, and the input of every linear in every block, from diffusers' own forward."""
    model = load_expert(folder, torch.float32)
    outputs, linears = [], [{} for _ in range(BLOCKS)]
    for block, inputs in zip(model.blocks, linears):
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(
                    lambda module, args, inputs=inputs, name=name: inputs.update({name: args[0]})
                )
    model(**calls)
    return outputs, linears


def close(a, b):
    """Equal up to the order in which a batch of another size is summed."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("size", [COUNT, 2])
def test_block_by_block_gives_what_the_whole_model_gives(folder, size):
    calls = random_calls(COUNT, torch.float32)
    outputs, linears = whole_model(folder, calls)
    denoiser = Denoiser(folder, "cpu", torch.float32)
    with torch.no_grad():
        glue = denoiser.glue()
        first = [(p, glue.inputs({k: v[s] for k, v in calls.items()})) for p, s in batches(lambda s: s, size)]
    for index in range(BLOCKS):
        observed = {site.name: [] for site in SITES}

        def observe(site, x, positions, observed=observed):
            assert len(x) == len(positions)
            observed[site].append(x)

        replayed = list(replay_block(denoiser.block(index), SITES, first, observe))
        assert [positions for positions, _ in replayed] == [positions for positions, _ in first]
        assert close(torch.cat([output for _, output in replayed]), outputs[index])
        for site in SITES:
            for linear in site.linears:
                assert close(torch.cat(observed[site.name]), linears[index][linear])
        first = [(p, replace(inputs, hidden_states=output)) for (p, inputs), (_, output) in zip(first, replayed)]


def test_the_whole_batch_at_once_is_exact(folder):
    calls = random_calls(COUNT, torch.float32)
    outputs, _ = whole_model(folder, calls)
    denoiser = Denoiser(folder, "cpu", torch.float32)
    with torch.no_grad():
        inputs = denoiser.glue().inputs(calls)
    for index in range(BLOCKS):
        ((_, output),) = replay_block(denoiser.block(index), SITES, [(range(COUNT), inputs)], lambda *_: None)
        assert torch.equal(output, outputs[index])
        inputs = replace(inputs, hidden_states=output)


def test_hooks_are_gone_afterwards_even_after_a_failure(folder):
    block = Denoiser(folder, "cpu", torch.float32).block(0)
    with pytest.raises(RuntimeError, match="stopped"), site_inputs(block, SITES, lambda *_: None):
        assert sum(len(module._forward_pre_hooks) for module in block.modules()) == len(SITES)
        raise RuntimeError("stopped")
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_the_input_of_the_text_does_not_depend_on_t(folder):
    """attn2.kv has one clip for all bins because of this; every other site has another input at another t."""
    calls = random_calls(1, torch.float32)
    denoiser = Denoiser(folder, "cpu", torch.float32)
    observed = []
    with torch.no_grad():
        glue, block = denoiser.glue(), denoiser.block(0)
        for t in (1000.0, 500.0):
            inputs = glue.inputs(calls | {"timestep": torch.tensor([t])})
            found = {}
            list(replay_block(block, SITES, [(range(1), inputs)], lambda site, x, positions: found.update({site: x})))
            observed.append(found)
    same = {site.name: torch.equal(observed[0][site.name], observed[1][site.name]) for site in SITES}
    assert same == {site.name: not site.depends_on_timestep for site in SITES}


def test_sums_are_on_the_device_of_the_input(monkeypatch):
    """Index included. Failed before: the sums of an input on cuda:1 were on cuda:0."""
    devices = []

    class Observer:
        def __init__(self, channels, plan, device, where):
            devices.append(device)

        def observe(self, x, calls, positions):
            pass

    monkeypatch.setattr(replay, "SiteObserver", Observer)
    observers = BlockObservers(SimpleNamespace(expert="low_noise"), 0, [], {"ffn.up": None})
    observers.observe("ffn.up", SimpleNamespace(shape=(2, 10, 6), device=torch.device("cuda:1")), range(0))
    assert devices == [torch.device("cuda:1")]
