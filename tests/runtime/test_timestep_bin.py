"""All quantized linears of a denoiser have one bin: one write reaches them all, also after a move or a copy."""

import copy

import pytest
import torch
import torch._dynamo
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import nn
from torch._dynamo.testing import CompileCounter

from stepquant.runtime.layout import QuantizationSettings
from stepquant.runtime.linear import W4A4Linear
from stepquant.runtime.timestep import follow_timestep
from tests.device_fixture import CUDA, assert_as_on_cpu

EDGES = (1000.0, 950.0, 925.0, 900.0)
TIMESTEPS = [1000, 940, 910]  # one in each bin
CPU = torch.device("cpu")


def make_linear(seed, eight_bit_bins):
    eight_bits = {"linear": eight_bit_bins}
    settings = QuantizationSettings(
        "int4", "int4", "ceil", "absmax", 4, False, {}, EDGES, ("linear",), "int8", eight_bits
    )
    linear = W4A4Linear(64, 64, True, settings, device="cpu", rotation=16, eight_bit_bins=eight_bit_bins)
    g = torch.Generator().manual_seed(seed)
    linear.qweight.copy_(torch.randint(-128, 128, (64, 32), generator=g))
    linear.wscales.copy_(0.01 * torch.rand(1, 64, generator=g))
    linear.smooth_factor.copy_(0.5 + torch.rand(64, generator=g))
    linear.proj_down.copy_(torch.randn(64, 4, generator=g))
    linear.proj_up.copy_(torch.randn(64, 4, generator=g))
    linear.clip_ratio.copy_(torch.tensor([1.0, 0.4, 0.15]))
    linear.bias.copy_(torch.randn(64, generator=g))
    return linear


class Denoiser(nn.Module):
    """Two quantized linears on different levels of the module tree, and a parameter of its own.

    In the first bin neither linear takes 8 bits, in the second one does, in the third both.
    """

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(64), requires_grad=False)
        self.first = make_linear(1, (2,))
        self.block = nn.Sequential(nn.GELU(), make_linear(2, (1, 2)))

    def forward(self, hidden_states, timestep):
        return self.block(self.first(hidden_states + self.table))


def make_denoiser():
    denoiser = Denoiser()
    follow_timestep(denoiser, EDGES)
    return denoiser


@pytest.fixture(params=["cpu", *CUDA])
def offload_device(request):
    """No pretend device: accelerate and diffusers move tensors in ways that only real devices allow."""
    return torch.device(request.param)


@pytest.fixture
def x():
    return torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def expected(x):
    """Output of each timestep, with the bin of each linear set by hand."""
    denoiser, outputs = Denoiser(), []
    for index in range(3):
        denoiser.first.bin.set(index)
        denoiser.block[1].bin.set(torch.tensor([index]))
        outputs.append(denoiser(x, None))
    assert not any(torch.equal(outputs[i], outputs[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    return outputs


def check(denoiser, x, expected, device="cpu"):
    for t, output in zip(TIMESTEPS, expected):
        found = denoiser(x.to(device), torch.tensor([t], device=device))
        assert_as_on_cpu(
            found, output, str(device), rtol=1e-3, atol=0.1
        )  # on CUDA, where a code may round the other way


def test_all_linears_hold_the_same_bin(x, expected):
    denoiser = make_denoiser()
    assert denoiser.first.bin is denoiser.block[1].bin
    check(denoiser, x, expected)


def test_no_hook_that_moves_tensors_finds_the_bin():
    names = {name for name, _ in make_denoiser().named_buffers()} | set(make_denoiser().state_dict())
    assert not any("bin" in name for name in names)


def test_a_deep_copy_has_one_bin_of_its_own(x, expected):
    denoiser = make_denoiser()
    other = copy.deepcopy(denoiser)
    assert other.first.bin is other.block[1].bin and other.first.bin is not denoiser.first.bin
    denoiser(x, torch.tensor([1000]))
    other(x, torch.tensor([910]))
    assert denoiser.first.bin.on(CPU).item() == 0 and other.first.bin.on(CPU).item() == 2
    check(other, x, expected)


def test_moving_a_linear_leaves_the_bin(x):
    """`to` moves the Hadamard matrix, which is a buffer, and not the bin."""
    denoiser = make_denoiser()
    denoiser(x, torch.tensor([910]))
    denoiser.first.to("meta")
    assert denoiser.first.hadamard.device.type == "meta"
    assert denoiser.first.bin is denoiser.block[1].bin and denoiser.first.bin.on(CPU).item() == 2
    assert denoiser.first.bin.on(torch.device("meta")).device.type == "meta"
    assert denoiser.first.bin.on(CPU).item() == 2


def test_sequential_offload(offload_device, x, expected):
    """As enable_sequential_cpu_offload does: each linear's tensors are on the device for its own forward only."""
    denoiser = make_denoiser()
    cpu_offload(denoiser, execution_device=offload_device, offload_buffers=True)
    assert denoiser.first.qweight.device.type == denoiser.block[1].clip_ratio.device.type == "meta"
    check(denoiser, x, expected, offload_device)
    assert denoiser.first.qweight.device.type == "meta"


def test_a_timestep_on_the_cpu_reaches_linears_on_a_device(device, x, expected):
    denoiser = make_denoiser().to(device)
    for t, output in zip(TIMESTEPS, expected):
        assert_as_on_cpu(denoiser(x.to(device), torch.tensor([t])), output, device, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_group_offload(offload_device, kind, x, expected):
    denoiser = make_denoiser()
    extra = {"num_blocks_per_group": 1} if kind["offload_type"] == "block_level" else {}
    apply_group_offloading(denoiser, onload_device=offload_device, offload_device=CPU, **kind, **extra)
    check(denoiser, x, expected, offload_device)


def test_calls_inside_and_outside_of_inference_mode(x, expected):
    """A tensor made in inference mode cannot be written outside of it, so the bin must not be written in place."""
    denoiser = make_denoiser()
    with torch.inference_mode():
        check(denoiser, x, expected)
    check(denoiser, x, expected)


def test_a_denoiser_compiles_once_over_timesteps(x, expected):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(make_denoiser(), backend=counter, fullgraph=True)
    compiled(x, torch.tensor([1000]))
    first = counter.frame_count  # the hook is a frame of its own
    check(compiled, x, expected)
    assert counter.frame_count == first == 2


def test_a_block_compiled_alone_follows_the_timestep(x, expected):
    """As compile_repeated_blocks does: the hook stays outside of the graph."""
    torch._dynamo.reset()
    denoiser, counter = make_denoiser(), CompileCounter()
    denoiser.block.compile(backend=counter, fullgraph=True)
    check(denoiser, x, expected)
    assert counter.frame_count == 1
