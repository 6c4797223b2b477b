"""W4A4Linear against the definition, written out with plain torch and the formats' tables."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from stepquant.errors import UserError
from stepquant.runtime import linear as linear_module
from stepquant.runtime.layout import QuantizationSettings
from stepquant.runtime.linear import W4A4Linear
from tests.runtime.definition import (
    EIGHT_BITS,
    FORMATS,
    OFFSETS,
    RATIOS,
    K,
    N,
    R,
    activation_by_hand,
    make_linear,
    weight_by_hand,
)


@pytest.mark.parametrize("bin_", range(3))
@pytest.mark.parametrize("rank", [0, R])
@pytest.mark.parametrize("activation", [*FORMATS, None])
@pytest.mark.parametrize("weight", FORMATS)
def test_equals_the_definition(weight, activation, rank, bin_):
    linear = make_linear(weight, activation, rank)
    linear.bin.set(bin_)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 3, K)
    smoothed = x / linear.smooth_factor.float()
    if activation:
        smoothed = activation_by_hand(smoothed, activation, RATIOS[bin_], OFFSETS[bin_], "ceil")
    expected = smoothed @ weight_by_hand(linear, weight).T + linear.bias
    if rank:  # the branch is fed by x, not by x / smooth_factor
        expected += x @ linear.proj_down.float() @ linear.proj_up.float().T
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x.view(1, 3, 1, K)), expected.view(1, 3, 1, N), rtol=1e-5, atol=1e-5)


def sylvester(order):
    """Sylvester's Hadamard matrix, entry by entry: -1 to the number of bits that are set in both row and column."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)])


@pytest.mark.parametrize("weight", FORMATS)
@pytest.mark.parametrize("rotation", [0, 16, 64])
def test_mean_subtraction_and_rotation(weight, rotation):
    linear = make_linear(weight, weight, mean_subtraction=True, rotation=rotation)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 3, K)
    z = (x - linear.mean.float()) / linear.smooth_factor.float()
    if rotation:
        z = z @ torch.block_diag(*[sylvester(rotation) / rotation**0.5] * (K // rotation))
    expected = (
        activation_by_hand(z, weight, RATIOS[0], OFFSETS[0] if weight == "mxfp4" else 0, "ceil")
        @ weight_by_hand(linear, weight).T
    )
    expected += linear.bias + x @ linear.proj_down.float() @ linear.proj_up.float().T
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("activation", [*FORMATS, "int8_row", None])
@pytest.mark.parametrize("weight", ["asym_w4a8", "int4"])
def test_what_comfyui_has_beside_all_else(weight, activation, eight_bits):
    """Its weights, its activations and its Hadamard matrix, with a mean, a branch, clips and 8-bit bins."""
    if eight_bits and activation not in EIGHT_BITS:
        with pytest.raises(UserError, match="eight_bit_format is 'int8', but .*; allowed: null"):
            QuantizationSettings(
                weight, activation, "ceil", "absmax", 0, False, {}, (9.0, 0.0), ("a",), "int8", {"a": (0,)}
            )
        return
    kinds = {"mean_subtraction": True, "rotation": 16, "hadamard": "regular"}
    linear = make_linear(weight, activation, **kinds, eight_bit_bins=(1,) if eight_bits else ())
    factor = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    matrix = torch.block_diag(*[torch.kron(factor, factor) / 4] * (K // 16))
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.2, 3, K)
    z = (x - linear.mean.float()) / linear.smooth_factor.float() @ matrix
    rest = linear.bias + x @ linear.proj_down.float() @ linear.proj_up.float().T
    for bin_ in range(2):
        linear.bin.set(bin_)
        rounding = (activation, RATIOS[bin_], OFFSETS[bin_] if activation == "mxfp4" else 0)
        if eight_bits and bin_ == 1:
            rounding = (EIGHT_BITS[activation], 1.0, 0)
        rounded = activation_by_hand(z, *rounding, "ceil") if activation else z
        expected = rounded @ weight_by_hand(linear, weight).T + rest
        torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)


def test_a_rotation_that_does_not_fit():
    with pytest.raises(UserError, match="256 for 128 channels"):
        make_linear("int4", "int4", rotation=256)


def test_activation_rounding_floor():
    linear = make_linear("mxfp4", "mxfp4", rounding="floor")
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2))
    expected = activation_by_hand(x / linear.smooth_factor.float(), "mxfp4", 1.0, 0, "floor")
    torch.testing.assert_close(linear.quantized_input(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bin_", [0, 1])
def test_activation_scales_by_error(bin_):
    """Of absmax / 6 and absmax / 4, each times the clip: per group what rounds to the smaller squared error."""
    linear = make_linear("int4", "nvfp4", scales="error")
    linear.bin.set(bin_)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2)) ** 3
    z = x / linear.smooth_factor.float()
    six, four = (activation_by_hand(z, "nvfp4", RATIOS[bin_] * factor, 0, "ceil") for factor in (1, 1.5))
    errors = [(rounded - z).view(3, -1, 16).square().sum(-1, keepdim=True) for rounded in (six, four)]
    assert 0.1 < (errors[1] < errors[0]).float().mean() < 0.9
    expected = torch.where(errors[1] < errors[0], four.view(3, -1, 16), six.view(3, -1, 16)).view(3, K)
    torch.testing.assert_close(linear.quantized_input(x), expected, rtol=1e-6, atol=0)


def test_no_bias():
    linear = make_linear("int4", "int4", bias=False)
    assert linear.bias is None
    assert torch.equal(linear(torch.zeros(2, K)), torch.zeros(2, N))


@pytest.mark.parametrize("fmt", FORMATS)
def test_low_precision_input(fmt):
    """bfloat16 in, bfloat16 out, off from float32 by roundings of 2^-9 only: scales and codes are still exact."""
    linear = make_linear(fmt, None)
    x = torch.randn(16, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = linear(x.float())
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() < 2**-7 * exact.norm()


@pytest.mark.parametrize("fmt", FORMATS)
def test_state(fmt):
    """The layout and the bias are stored. The bin is neither stored nor moved with the module."""
    linear = make_linear(fmt, fmt)
    expected = {"qweight", "wscales", "smooth_factor", "proj_down", "proj_up", "clip_ratio", "bias"}
    expected |= {"wtscale", "wcscales"} if fmt == "nvfp4" else set()
    expected |= {"clip_exponent"} if fmt == "mxfp4" else set()
    assert set(linear.state_dict()) == expected
    assert set(dict(linear.named_buffers())) == expected - {"bias"}
    assert all(t.device.type == "meta" for t in (*linear.to("meta").buffers(), *linear.parameters()))
    assert isinstance(linear, torch.nn.Linear)


def test_weight_takes_four_bits_and_its_scales():
    linear = make_linear("nvfp4", "nvfp4")
    assert linear.qweight.nbytes + linear.wscales.nbytes == N * K * 4.5 / 8


def test_group_must_divide_the_channels():
    settings = QuantizationSettings("nvfp4", "int4", "ceil", "absmax", 0, False, {}, (1000.0, 0.0), ("a",))
    with pytest.raises(UserError, match="96 channels .* int4 groups; allowed: a multiple of 64"):
        W4A4Linear(96, N, True, settings, device="cpu")


@pytest.mark.parametrize(("fmt", "scales"), [*((fmt, "absmax") for fmt in FORMATS), ("nvfp4", "error")])
def test_compiles_once_over_bins(fmt, scales):
    torch._dynamo.reset()
    linear = make_linear(fmt, fmt, scales=scales)
    counter = CompileCounter()
    compiled = torch.compile(linear, backend=counter, fullgraph=True)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
    outputs = []
    for bin_ in range(3):
        linear.bin.set(bin_)
        outputs.append(compiled(x))
        assert torch.equal(outputs[-1], linear(x))
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_bias_is_not_rounded_before_it_cancels(dtype):
    """The bias holds mean @ W.T, which can be a thousand times the output. Only the output itself is rounded."""
    linear = make_linear("int4", None, mean_subtraction=True)
    g = torch.Generator().manual_seed(3)
    linear.mean.copy_(1000 * torch.randn(K, generator=g))
    noise = torch.randn(16, K, generator=g)
    x = linear.mean.to(dtype) + noise.to(dtype)  # on the grid of its dtype, in which the mean is as well
    z = ((x.double() - linear.mean.double()) / linear.smooth_factor.double()).to(dtype)
    branch = x.double() @ linear.proj_down.double() @ linear.proj_up.double().T
    rounded_branch = F.linear(x @ linear.proj_down.to(dtype), linear.proj_up.to(dtype)).double()
    W = weight_by_hand(linear, "int4").to(dtype).double()
    linear.bias.copy_((z.double() @ W.T + branch).mean(0).neg())
    product = F.linear(z, W.to(dtype)).double()  # the GEMM rounds its own result
    expected = product + linear.bias.double() + rounded_branch
    assert linear.bias.abs().max() > 20 * expected.abs().mean()
    torch.testing.assert_close(linear(x), expected.to(dtype), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_sample_has_the_clip_of_its_own_timestep(fmt, shape, monkeypatch):
    """Three samples in three bins, by three calls of one sample; in one piece and in slabs across samples."""
    linear = make_linear(fmt, fmt, mean_subtraction=True)
    x = torch.randn(3, *shape, K, generator=torch.Generator().manual_seed(2))
    alone = []
    for sample, bin_ in zip(x, (2, 0, 1)):
        linear.bin.set(bin_)
        alone.append(linear(sample))
    linear.bin.set(torch.tensor([2, 0, 1]))
    whole = linear(x)
    torch.testing.assert_close(whole, torch.stack(alone), rtol=1e-5, atol=1e-5)
    linear.bin.set(torch.tensor([0, 0, 0]))
    assert not torch.allclose(linear(x), whole, atol=1e-2)
    linear.bin.set(torch.tensor([2, 0, 1]))
    monkeypatch.setattr(linear_module, "TOKENS_PER_SLAB", 2)
    torch.testing.assert_close(linear(x), whole, rtol=1e-5, atol=1e-5)


def test_an_input_with_another_number_of_samples_is_refused():
    linear = make_linear("int4", "int4")
    linear.bin.set(torch.tensor([2, 0, 1]))
    with pytest.raises(UserError, match=r"shape \(2, 5, 128\), but the denoiser was called with 3 timesteps"):
        linear(torch.zeros(2, 5, K))


def test_one_graph_for_all_bins_of_a_batch():
    torch._dynamo.reset()
    linear, counter = make_linear("mxfp4", "mxfp4"), CompileCounter()
    compiled = torch.compile(linear, backend=counter, fullgraph=True)
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2))
    for bins in ([0, 1], [2, 2], [1, 0]):
        linear.bin.set(torch.tensor(bins))
        assert torch.equal(compiled(x), linear(x))
    assert counter.frame_count == 1
